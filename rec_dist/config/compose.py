"""Reads YAML files: what they extend, the runs that a file defines by name, overrides and interpolations.

A file, and each run in it, may begin with `extends`: one entry or a list, merged from left to right below its own keys. An entry
is a path relative to the file (it ends in .yaml, or begins with ./ or /), another run of the same file, or a shipped
configuration such as method/sdpo. `FILE:NAME` is the run NAME of a file.
"""

import re
from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rec_dist.config.overrides import Overrides, first_line, override, update
from rec_dist.config.shipped import is_name, shipped_file, suggestion
from rec_dist.errors import UserError, one_line

PIPELINE, RUNS, VARS, MATRIX = "pipeline", "runs", "vars", "matrix"  # the sections of a file for `rec-dist run`
_EXTENDS = "extends"
_Place = tuple[Path, str | None]  # a file, and a run in it


def load_mapping(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> dict[str, Any]:
    """A configuration with overrides on top, and all interpolations resolved.

    source: a YAML file, the name of a shipped recipe, either with `:NAME` for one of its runs, or a mapping of sections.
    overrides: words section.key=value, or a mapping of keys (dotted or nested) to values.
    Raises UserError for a missing or unreadable file, a cycle of `extends`, or a malformed override.
    """
    return resolved(load_unresolved(source, overrides), "the configuration" if isinstance(source, Mapping) else str(source))


def load_unresolved(source: str | Path | Mapping[str, Any], overrides: Overrides = ()) -> DictConfig:
    """As load_mapping, before interpolations are resolved."""
    try:
        merged = _of_mapping(source) if isinstance(source, Mapping) else _read(locate(Path(source)), ())
        named = {section: [str(name) for name in _mapping(merged, section)] for section in (VARS, RUNS)}
        return override(OmegaConf.create(merged), overrides, named)
    except RecursionError:
        raise UserError(
            "the configuration holds itself: one of its mappings or lists is an entry of its own; write that entry out"
        ) from None


def resolved(config: DictConfig, where: str) -> dict[str, Any]:
    """A mapping without interpolations. Raises UserError for one that leads nowhere. where: named in that message."""
    try:
        value = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as fault:
        raise UserError(f"{where}: {first_line(fault)}") from fault
    assert isinstance(value, dict)
    return {str(key): entry for key, entry in value.items()}


def load_plain(path: Path) -> dict[str, Any]:
    """One file as it is: nothing is resolved, and `extends` is a key like any other. Raises UserError if it cannot be read."""
    return dict(_load(path))


def sections(path: Path) -> set[str]:
    """The top-level keys of a file and of what it extends, without overrides. They say what kind of file it is."""
    return {str(key) for key in _read(locate(path), ())}


def runs_of(path: Path) -> list[str]:
    """The runs that a file defines and a command can take: those with a train.run_dir. The others are only extended."""
    file, _ = locate(path)
    names = [str(name) for name in _mapping(_read((file, None), ()), RUNS)]
    return [name for name in names if "run_dir" in _mapping(_read((file, name), ()), "train")]


def locate(target: Path) -> _Place:
    """The file that a CONFIG argument means and the run in it. The file may not exist."""
    text = str(target)
    try:
        if target.expanduser().is_file():
            return target.expanduser().resolve(), None
        file, run = _split(text)
        if is_name(file) and not Path(file).is_file() and shipped_file(file).is_file():
            return shipped_file(file), run
        return Path(file).expanduser().resolve(), run
    except (OSError, RuntimeError, ValueError) as fault:
        raise UserError(f"{text[:200]} is no usable path ({first_line(fault)[:200]}); give the path of a YAML file") from fault


def _of_mapping(source: Mapping[str, Any]) -> dict[str, Any]:
    """A mapping with what it extends. Relative paths in its `extends` start at the current folder."""
    if _holds_itself(source):
        raise RecursionError  # OmegaConf would find it at Python's limit, after 10 CPU seconds
    return _merged(_plain(update(OmegaConf.create(), source)), (Path.cwd() / "the configuration", None), (), set())


def _holds_itself(value: Any, above: tuple[int, ...] = ()) -> bool:
    """Whether a mapping or list is an entry of its own, at any depth. above: the ids of those that hold `value`."""
    if not isinstance(value, Mapping | list | tuple):
        return False
    entries = value.values() if isinstance(value, Mapping) else value
    return id(value) in above or any(_holds_itself(entry, (*above, id(value))) for entry in entries)


def _split(text: str) -> tuple[str, str | None]:
    """FILE:NAME -> the file and the run."""
    file, colon, run = text.rpartition(":")
    return (file, run) if colon and file and not re.search(r"[/\\]", run) else (text, None)


def _read(place: _Place, above: tuple[_Place, ...]) -> dict[str, Any]:
    """A file, or a run of it, merged on top of what it extends. above: the files and runs that extend this one."""
    if place in above:
        chain = " -> ".join(_shown(each) for each in above)
        raise UserError(f"{_shown(place)} extends itself through {chain}; remove one `extends`")
    path, run = place
    if run is None:
        return _merged(_load(path), place, above, set())
    document = _read((path, None), (*above, place))
    runs = _mapping(document, RUNS)
    if run not in runs:
        raise UserError(
            f"{_shown(place)} does not exist; " + (f"runs of {path}: {', '.join(runs)}" if runs else f"{path} has no `{RUNS}`")
        )
    own = {VARS: document[VARS], **runs[run]} if document.get(VARS) is not None else runs[run]
    return _merged(own, place, above, set(runs))


def _merged(own: dict[str, Any], place: _Place, above: tuple[_Place, ...], runs: set[str]) -> dict[str, Any]:
    """`own` on top of what it extends. runs: what the same file defines."""
    merged: dict[str, Any] = {}
    for entry in _entries(own.get(_EXTENDS), place):
        merged = _on_top(_read(_extended(entry, place[0], runs), (*above, place)), merged)
    return _on_top({key: value for key, value in own.items() if key != _EXTENDS}, merged)


def _on_top(own: dict[str, Any], below: dict[str, Any]) -> dict[str, Any]:
    """Sections are merged key by key; anything else replaces what is below it."""
    merged = {**below, **own}
    for key in own.keys() & below.keys():
        if isinstance(own[key], dict) and isinstance(below[key], dict):
            merged[key] = _on_top(own[key], below[key])
    return merged


def _load(path: Path) -> dict[str, Any]:
    """One YAML file. Paths that its runs extend become absolute, because runs are merged across files."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a YAML configuration in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist; {suggestion(path.stem)}")
    facts = path.stat()
    own = _parse(path, facts.st_mtime_ns, facts.st_size)
    runs = own.get(RUNS)
    if not isinstance(runs, dict):
        return own
    for name, run in runs.items():
        if not isinstance(run, dict):
            raise UserError(f"{path}: {RUNS}.{name} holds no mapping of sections")
        if re.search(r"[/\\:]", str(name)):
            raise UserError(
                f"{path}: {RUNS} has the name {name!r}, which FILE:NAME cannot hold; take one without slashes and colons"
            )
    return {**own, RUNS: {str(name): _with_absolute_paths(run, (path, str(name))) for name, run in runs.items()}}


@lru_cache(maxsize=64)  # a recipe's runs extend the same files again and again, and OmegaConf takes milliseconds for each
def _parse(path: Path, mtime_ns: int, num_bytes: int) -> dict[str, Any]:
    """A file's contents, which nobody may change. mtime_ns, num_bytes: of the file, so that a changed one is read again."""
    try:
        own = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as fault:
        raise UserError(f"{path} is not readable YAML: {one_line(fault)}") from fault
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} holds no mapping of sections; `rec-dist init quickstart` writes an example")
    return _plain(own)


def _plain(config: DictConfig) -> dict[str, Any]:
    """Interpolations stay as they are written."""
    value = OmegaConf.to_container(config)
    assert isinstance(value, dict)
    return {str(key): entry for key, entry in value.items()}


def _with_absolute_paths(run: dict[str, Any], place: _Place) -> dict[str, Any]:
    if _EXTENDS not in run:
        return run
    return {**run, _EXTENDS: [_absolute(entry, place[0]) for entry in _entries(run[_EXTENDS], place)]}


def _entries(value: Any, place: _Place) -> list[str]:
    """What stands behind `extends`, as a list."""
    entries = [] if value is None else value if isinstance(value, list) else [value]
    if not all(isinstance(entry, str) and "${" not in entry for entry in entries):
        raise UserError(f"{_shown(place)}: extends ({entries}) takes a path, a name or a list of them, without ${{...}}")
    return entries


def _absolute(entry: str, path: Path) -> str:
    file, run = _split(entry)
    return entry if is_name(file) else f"{path.parent / Path(file).expanduser()}{f':{run}' if run else ''}"


def _extended(entry: str, path: Path, runs: set[str]) -> _Place:
    """The file or run that an entry of `extends` means. runs: the names in the same file."""
    if entry in runs:
        return path, entry
    file, run = _split(_absolute(entry, path))
    if not is_name(file):
        return Path(file).resolve(), run
    if not shipped_file(file).is_file():
        raise UserError(f"{path} extends {entry}, which does not exist; {suggestion(file)}")
    return shipped_file(file), run


def _mapping(config: dict[str, Any], section: str) -> dict[str, Any]:
    value = config.get(section)
    return value if isinstance(value, dict) else {}


def _shown(place: _Place) -> str:
    return place[0].name + (f":{place[1]}" if place[1] else "")
