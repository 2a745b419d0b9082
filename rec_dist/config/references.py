"""Which text of a configuration comes from the environment, and the form in which a configuration is written down.

`${oc.env:NAME}` may hold a secret. The value serves the command that reads the configuration; what is written (config.yaml,
config.json, trackers, a job) has the reference again. Paths are the exception: a run names them wherever it says what it reads and
writes, so their values are kept, and credentials in a URI are refused. Numbers are kept, too.
"""

import re
import secrets
from collections.abc import Iterator, Mapping
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec_dist.config.paths import PATHS, PATHS_OR_NAMES, task_paths
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import dumped, escaped

Key = tuple[str, ...]
References = dict[Key, Any]  # key -> its text, or list of texts, as a YAML file holds it: escaped, but for ${oc.env:NAME}
_NOT_WRITTEN = ("submit", "plan")  # how a run is sent, with its variables, and what it is planned for: neither is of the run
_REFERENCE = re.compile(r"(\\*)(\$\{\s*oc\.(env|decode)\s*:[^${}]*\})")


class Marks:
    """Stand-ins for the references in a text, which pass through interpolation like any other word."""

    def __init__(self) -> None:
        self._stem, self._texts = f"env{secrets.token_hex(8)}x", dict[str, str]()

    def put(self, value: Any) -> Any:
        """`value` with a mark for each ${oc.env:NAME} that is not escaped; from the inside out, since a default may hold another."""
        if isinstance(value, dict):
            return {key: self.put(entry) for key, entry in value.items()}
        if isinstance(value, list):
            return [self.put(entry) for entry in value]
        while isinstance(value, str) and (marked := _REFERENCE.sub(self._mark, value)) != value:
            value = marked
        return value

    def _mark(self, found: re.Match[str]) -> str:
        of_environment = found[3] == "env" or self._stem in found[2]
        if len(found[1]) % 2 or not of_environment:  # escaped, so it is text; or decodes text of the file
            return found[0]
        name = f"{self._stem}{len(self._texts)}x"
        self._texts[name] = found[2]
        return found[1] + name

    def has(self, value: Any) -> bool:
        """Whether a mark is in a text or in an entry of a list."""
        return self._stem in value if isinstance(value, str) else isinstance(value, list) and any(map(self.has, value))

    def take(self, value: Any) -> Any:
        """`value` with the references in place of their marks."""
        if isinstance(value, list):
            return [self.take(entry) for entry in value]
        while isinstance(value, str) and self._stem in value:
            value = re.sub(self._stem + r"\d+x", lambda found: self._texts[found[0]], value)
        return value

    def __bool__(self) -> bool:
        return bool(self._texts)


def references(config: DictConfig) -> References:
    """The keys whose text comes from the environment, also by way of other keys (`${vars.token}`)."""
    marks = Marks()
    marked = OmegaConf.create(marks.put(OmegaConf.to_container(config)))
    assert isinstance(marked, DictConfig)
    found = _leaves(marked) if marks else ()
    return {key: marks.take(escaped(value)) for key, value in found if marks.has(value)}


def _leaves(config: DictConfig, above: Key = ()) -> Iterator[tuple[Key, Any]]:
    """(key, resolved value) of every value that is no mapping."""
    for name in config:
        try:
            value = config[name]
            plain = OmegaConf.to_container(value, resolve=True) if isinstance(value, ListConfig) else value
        except OmegaConfBaseException:  # the environment selects what stands here, and is no part of it
            continue
        if isinstance(value, DictConfig):
            yield from _leaves(value, (*above, str(name)))
        else:
            yield (*above, str(name)), plain


def raw_references(value: Mapping[str, Any], above: Key = ()) -> Iterator[Key]:
    """The keys of a file, read as it is, that hold a reference."""
    for name, entry in value.items():
        if isinstance(entry, Mapping):
            yield from raw_references(entry, (*above, name))
        elif (marks := Marks()).has(marks.put(entry)):
            yield (*above, name)


def get(value: Any, key: Key) -> Any:
    """The entry of nested mappings at `key`; None without one."""
    for name in key:
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def remember(config: RunConfig, found: References) -> RunConfig:
    """Notes in `config` what of it comes from the environment, and returns it."""
    config.from_environment.update(found)
    return config


def rebuilt(config: RunConfig, value: Mapping[str, Any]) -> RunConfig:
    """A configuration of the values `value`, which were those of `config` before a change of others than its references."""
    return remember(RunConfig.model_validate(value), config.from_environment)


def with_references(config: RunConfig, value: dict[str, Any]) -> dict[str, Any]:
    """`value`, the values of `config` (escaped or not), changed in place: each text from the environment is its reference again."""
    paths = {*PATHS, *PATHS_OR_NAMES, *(("task", section, *key.split(".", 1)) for section, key, _ in task_paths(config))}
    for key, text in config.from_environment.items():
        there = get(value, key)
        if key not in paths and isinstance(there, str | list | tuple) and (above := get(value, key[:-1])) is not None:
            above[key[-1]] = text
    return value


def recorded(config: RunConfig) -> tuple[dict[str, Any], str]:
    """What a run directory keeps of its configuration: as JSON values, and as YAML. Neither holds a secret of the environment."""
    value = with_references(config, config.model_dump(mode="json", exclude=set(_NOT_WRITTEN)))
    return value, as_yaml(config, exclude=_NOT_WRITTEN)


def as_yaml(config: RunConfig, *, exclude: tuple[str, ...] = (), exclude_unset: bool = False) -> str:
    """The configuration as YAML: as to_yaml, with references in place of what they resolved to."""
    value = escaped(config.model_dump(mode="json", exclude=set(exclude), exclude_unset=exclude_unset))
    return dumped(with_references(config, value))
