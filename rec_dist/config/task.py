"""The section `task`: which method trains, and the sections of the methods themselves, which come from methods/."""

from functools import cache
from typing import Any, Literal, TypeVar

from pydantic import Field, ValidationInfo, create_model, field_validator
from pydantic_core import PydanticCustomError

from rec_dist.config import method_table
from rec_dist.config.method_table import MethodError
from rec_dist.config.section import Section

_Section = TypeVar("_Section", bound=Section)
METHOD_ERROR = "method"  # the type of a fault whose message says what was given


class TaskConfig(Section):
    """The method."""

    plugin: str | None = Field(
        None,
        description="module:object of a method from outside this package, imported in every worker. None: task.kind is enough.",
    )
    kind: str = Field(
        "sft",
        description=f"Which method trains: {', '.join(method_table.BUILT_IN)}, or the name of one from outside. "
        "delrec_distill needs adapter.kind=soft_prompt, p2rec_reconstruct lora, others lora or none.",
    )
    beta: float = Field(
        1.0,
        gt=0,
        description="Strength of the pull to the reference (dpo, dmpo, sdpo, dynamicpo, recpo); scale of the likelihoods (mppo).",
    )
    reference: Literal["cached", "online"] = Field("cached", description="cached: log-probs computed once and stored.")

    def section(self, kind: type[_Section]) -> _Section:
        """The section of class `kind`, which the method that task.kind names or a built-in one has."""
        return next(value for key in type(self).model_fields if isinstance(value := getattr(self, key), kind))

    @field_validator("plugin")
    @classmethod
    def _is_there(cls, plugin: str | None) -> str | None:
        if plugin is not None:
            _as_fault(method_table.load_plugin, plugin)
        return plugin

    @field_validator("kind")
    @classmethod
    def _is_known(cls, kind: str, info: ValidationInfo) -> str:
        if "plugin" in info.data:
            _as_fault(method_table.check_kind, kind, info.data["plugin"])
        return kind


def _as_fault(check: Any, *arguments: Any) -> None:
    try:
        check(*arguments)
    except MethodError as fault:
        raise PydanticCustomError(METHOD_ERROR, "{what}", {"what": fault.what}) from fault


@cache
def task_model(outside: tuple[str, type[Section]] | None = None) -> type[TaskConfig]:
    """TaskConfig with the sections of all built-in methods, and that of one from outside: (key, class)."""
    base = TaskConfig if outside is None else task_model()
    sections = method_table.built_in_sections() if outside is None else dict([outside])
    fields: dict[str, Any] = {key: (section, _field(section)) for key, section in sections.items()}
    return create_model("TaskConfig", __base__=base, __module__=__name__, __doc__=TaskConfig.__doc__, **fields)


def _field(section: type[Section]) -> Any:
    """Left out, a section takes its defaults, unless a key of it is required."""
    if any(field.is_required() for field in section.model_fields.values()):
        return Field()
    return Field(default_factory=section)


def outside_section_of(task: Any) -> tuple[str, type[Section]] | None:
    """The section that the mapping `task` needs besides the built-in ones; None also where the mapping is at fault."""
    if not isinstance(task, dict):
        return None
    kind, plugin = task.get("kind", TaskConfig.model_fields["kind"].default), task.get("plugin")
    if not isinstance(kind, str) or not isinstance(plugin, str | None):
        return None
    try:
        return method_table.outside_section(kind, plugin)
    except MethodError:
        return None


def with_outside_section(value: Any) -> Any:
    """Validates a task whose method is from outside with that method's section; leaves any other as it is."""
    outside = outside_section_of(value)
    return value if outside is None else task_model(outside).model_validate(value)
