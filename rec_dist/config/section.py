"""What every section of a configuration has in common."""

from collections.abc import Iterator
from typing import Any

from pydantic import BaseModel, ConfigDict


class Section(BaseModel):
    """A section. Unknown keys are faults, values are not coerced to another type, and nothing changes after validation.

    Mark a path in a method's own section with json_schema_extra={"path": True}, and list in "names" the words it also takes.
    rec-dist then makes it absolute, moves it to submit.storage and refuses credentials in it.
    """

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, protected_namespaces=(), validate_default=True, allow_inf_nan=False
    )

    def paths(self) -> Iterator[tuple[str, str]]:
        """(key, path) of the marked fields that hold a path; (key.name, path) of those in a section, or in a mapping of paths."""
        for key, field in type(self).model_fields.items():
            marks, value = field.json_schema_extra, getattr(self, key)
            if isinstance(value, Section):
                yield from ((f"{key}.{name}", path) for name, path in value.paths())
            if isinstance(marks, dict) and marks.get("path") and value is not None:
                if isinstance(value, dict):
                    yield from ((f"{key}.{name}", path) for name, path in value.items())
                    continue
                names = marks.get("names")
                if not isinstance(names, list) or value not in names:
                    yield key, value

    def without_paths(self) -> dict[str, Any]:
        """The values of all fields but those that hold paths, also in sections: what a result depends on wherever its inputs lie."""
        held = {key.partition(".")[0] for key, _ in self.paths()}
        sections = {key: section for key in held if isinstance(section := getattr(self, key), Section)}
        return self.model_dump(exclude=held) | {key: section.without_paths() for key, section in sections.items()}
