"""The keys that hold paths, and how they become absolute."""

from pathlib import Path
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.config.section import Section
from rec_dist.errors import UserError
from rec_dist.storage.uri import expanded, is_remote, local_path, refuse_credentials, shown

# (section, key) of every path that a run reads or writes. PATHS_OR_NAMES may also hold a known name.
PATHS = (
    ("data", "path"),
    ("data", "cache_dir"),
    ("negatives", "model"),
    ("train", "run_dir"),
    ("train", "init_from"),
    ("evaluate", "questions"),
    ("evaluate", "output_dir"),
    ("profile", "output_dir"),
    ("checkpoint", "remote"),
)
_URIS = ("data.path", "checkpoint.remote")  # those that may be a URI
PATHS_OR_NAMES = (("data", "source"), ("model", "path"))


def absolute(path: str) -> Path:
    """Makes a path absolute. The driver does this for all paths, because workers run in another folder."""
    return local_path(path)


def check_path(key: str, path: str) -> None:
    """Raises UserError for an empty path, and for a URI where only a folder will do. key: dotted."""
    if not path.strip():
        raise UserError(f"{key} is empty, which would mean the current folder; give a path, or leave it out")
    if "://" in path and not (key in _URIS and is_remote(path)):
        copied = " (checkpoint.remote keeps a copy of it at a URI)" if key == "train.run_dir" else ""
        raise UserError(f"{key} ({shown(path)}) is a URI; give a folder, on a cluster one that every node mounts{copied}")


def paths_of(config: RunConfig) -> dict[str, str | None]:
    """Every path that a run reads or writes, unchanged, by its dotted key."""
    found = {f"{section}.{key}": getattr(getattr(config, section), key) for section, key in (*PATHS, *PATHS_OR_NAMES)}
    return found | {f"task.{section}.{key}": path for section, key, path in task_paths(config)}


def task_paths(config: RunConfig) -> list[tuple[str, str, str]]:
    """(section below task, key, path) of every path in the sections of methods."""
    sections = {name: getattr(config.task, name) for name in type(config.task).model_fields}
    return [(name, *found) for name, section in sections.items() if isinstance(section, Section) for found in section.paths()]


def set_task_path(value: dict[str, Any], section: str, key: str, path: str) -> None:
    """Sets one path of task_paths() in a configuration as a mapping. key: as there, with a dot for one of several paths."""
    below = value.setdefault("task", {}).setdefault(section, {})
    first, _, name = key.partition(".")
    if name:
        below.setdefault(first, {})[name] = path
    else:
        below[first] = path


def check_uris(config: RunConfig) -> None:
    """Raises UserError for a URI with credentials in it, because the configuration is written down."""
    for key, path in {**paths_of(config), "plan.model": config.plan.model, "plan.cluster": config.plan.cluster}.items():
        if path is not None:
            refuse_credentials(path, key)


def pinned(config: RunConfig) -> RunConfig:
    """The configuration with every path absolute, as workers need it.

    Raises UserError for a URI where only a folder will do.
    """
    value = config.model_dump()
    for section, key in PATHS_OR_NAMES:
        if value[section][key] is not None and expanded(value[section][key]).exists():
            value[section][key] = str(absolute(value[section][key]))
    for section, key in PATHS:
        path = value[section][key]
        if path is None:
            continue
        check_path(f"{section}.{key}", path)
        if is_remote(path):
            continue
        value[section][key] = str(absolute(path))
    for section, key, path in task_paths(config):
        check_path(f"task.{section}.{key}", path)
        set_task_path(value, section, key, str(absolute(path)))
    result = RunConfig.model_validate(value)
    result.from_environment.update(config.from_environment)
    return result
