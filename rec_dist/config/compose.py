"""Reads YAML files: what they extend, the runs that a file defines by name, overrides and interpolations.

A file, and each run in it, may begin with `extends`: one entry or a list, merged from left to right below its own keys. An entry
is a path relative to the file (it ends in .yaml, or begins with ./ or /), another run of the same file, or a shipped
configuration such as method/sdpo. `FILE:NAME` is the run NAME of a file.
"""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rec_dist.config.shipped import is_name, shipped_file, suggestion
from rec_dist.errors import UserError

PIPELINE, RUNS, VARS, MATRIX = "pipeline", "runs", "vars", "matrix"  # the sections of a file for `rec-dist run`
_EXTENDS = "extends"
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)
_Place = tuple[Path, str | None]  # a file, and a run in it


def is_override(word: str) -> bool:
    """Whether a word of a command line is section.key=value."""
    return _OVERRIDE.match(word) is not None


def load_mapping(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The configuration at `path` with `key=value` overrides on top, and all interpolations resolved.

    path: a YAML file, the name of a shipped recipe, or either with `:NAME` for one of its runs.
    Raises UserError for a missing or unreadable file, a cycle of `extends`, or a malformed override.
    """
    return resolved(load_unresolved(path, overrides), str(path))


def load_unresolved(path: Path, overrides: Sequence[str] = ()) -> DictConfig:
    """As load_mapping, before interpolations are resolved."""
    merged = _read(locate(path), ())
    named = {section: merged.get(section) or {} for section in (VARS, RUNS)}
    for override in overrides:
        if not is_override(override):
            raise UserError(f"override {override!r} is not section.key=value; for example optimizer.lr=1e-4")
        section, _, key = override.partition("=")[0].partition(".")
        if section in named and key.partition(".")[0] not in named[section]:
            raise UserError(f"override {override!r}: {path} has no such name; it has {_listed(named[section], section)}")
        try:
            merged = OmegaConf.merge(merged, OmegaConf.from_dotlist([override]))
        except (OmegaConfBaseException, YAMLError, TypeError, UnicodeError) as fault:
            raise UserError(f"override {override!r} cannot be applied: {_first_line(fault)}") from fault
    assert isinstance(merged, DictConfig)
    return merged


def resolved(config: DictConfig, where: str) -> dict[str, Any]:
    """A mapping without interpolations. Raises UserError for one that leads nowhere. where: named in that message."""
    try:
        value = OmegaConf.to_container(config, resolve=True)
    except OmegaConfBaseException as fault:
        raise UserError(f"{where}: {_first_line(fault)}") from fault
    assert isinstance(value, dict)
    return {str(key): entry for key, entry in value.items()}


def sections(path: Path) -> set[str]:
    """The top-level keys of a file and of what it extends, without overrides. They say what kind of file it is."""
    return {str(key) for key in _read(locate(path), ())}


def runs_of(path: Path) -> list[str]:
    """The names of the runs that a file and what it extends define."""
    file, _ = locate(path)
    return [str(name) for name in _read((file, None), ()).get(RUNS) or ()]


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
        raise UserError(f"{text[:200]} is no usable path ({_first_line(fault)[:200]}); give the path of a YAML file") from fault


def _split(text: str) -> tuple[str, str | None]:
    """FILE:NAME -> the file and the run."""
    file, colon, run = text.rpartition(":")
    return (file, run) if colon and file and not re.search(r"[/\\]", run) else (text, None)


def _read(place: _Place, above: tuple[_Place, ...]) -> DictConfig:
    """A file, or a run of it, merged on top of what it extends. above: the files and runs that extend this one."""
    if place in above:
        chain = " -> ".join(_shown(each) for each in above)
        raise UserError(f"{_shown(place)} extends itself through {chain}; remove one `extends`")
    path, run = place
    below, names = (*above, place), set()
    if run is None:
        own = _load(path)
    else:
        document = _read((path, None), below)
        own, names = _run_of(document, place), set(document[RUNS])
    try:
        entries = _entries(own.pop(_EXTENDS, None), place)
        parents = [_read(_extended(entry, path, names), below) for entry in entries]
        merged = OmegaConf.merge(*parents, own)
    except (OmegaConfBaseException, TypeError) as fault:
        raise UserError(f"{_shown(place)} and what it extends do not fit together: {_first_line(fault)}") from fault
    assert isinstance(merged, DictConfig)
    return merged


def _load(path: Path) -> DictConfig:
    """One YAML file. Paths that its runs extend become absolute, because runs are merged across files."""
    if path.is_dir():
        raise UserError(f"{path} is a folder; give the path of a YAML configuration in it")
    if not path.is_file():
        raise UserError(f"{path} does not exist; {suggestion(path.stem)}")
    try:
        own = OmegaConf.load(path)
    except (YAMLError, OSError, UnicodeDecodeError, OmegaConfBaseException, RecursionError) as fault:
        raise UserError(f"{path} is not readable YAML: {' '.join(str(fault).split())}") from fault
    if not isinstance(own, DictConfig):
        raise UserError(f"{path} holds no mapping of sections; `rec-dist init quickstart` writes an example")
    plain = OmegaConf.to_container(own)
    assert isinstance(plain, dict)
    runs = plain.get(RUNS)
    for name, run in runs.items() if isinstance(runs, dict) else ():
        if not isinstance(run, dict):
            raise UserError(f"{path}: {RUNS}.{name} holds no mapping of sections")
        if _EXTENDS in run:
            run[_EXTENDS] = [_absolute(entry, path) for entry in _entries(run[_EXTENDS], (path, str(name)))]
    return OmegaConf.create(plain)


def _run_of(document: DictConfig, place: _Place) -> DictConfig:
    runs = document.get(RUNS)
    if runs is None or place[1] not in runs:
        raise UserError(f"{_shown(place)} does not exist; {place[0]} has {_listed(runs, RUNS)}")
    own = OmegaConf.create(OmegaConf.to_container(runs[place[1]]))  # a copy, so that interpolations start at the run
    if document.get(VARS) is not None:
        own[VARS] = document[VARS]
    return own


def _entries(value: Any, place: _Place) -> list[str]:
    """What stands behind `extends`, as a list."""
    entries = OmegaConf.to_container(value) if OmegaConf.is_config(value) else value
    entries = [] if entries is None else entries if isinstance(entries, list) else [entries]
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


def _shown(place: _Place) -> str:
    return place[0].name + (f":{place[1]}" if place[1] else "")


def _listed(mapping: Any, section: str) -> str:
    return f"{section}: {', '.join(str(key) for key in mapping)}" if mapping else f"no `{section}`"


def _first_line(fault: BaseException) -> str:
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
