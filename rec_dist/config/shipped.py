"""The configurations that rec-dist ships: where they lie, their names, and the recipes among them.

In a checkout they are the folder configs/. A wheel carries the same folder as rec_dist/configs.
"""

import difflib
from dataclasses import dataclass
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.storage.uri import expanded

RECIPES = "recipes"
_PACKAGE = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Recipe:
    """A shipped recipe, with what its first line says: `# COMMAND: DESCRIPTION`."""

    name: str
    command: str
    description: str


def configs_dir() -> Path:
    """The folder of the shipped configurations."""
    packaged = _PACKAGE / "configs"
    return packaged if packaged.is_dir() else _PACKAGE.parent / "configs"


def recipes() -> list[Recipe]:
    """All recipes, by name."""
    found = []
    for path in sorted((configs_dir() / RECIPES).glob("*.yaml"), key=lambda path: path.stem):
        first = path.read_text(encoding="utf-8").partition("\n")[0]
        command, _, description = first.removeprefix("# ").partition(": ")
        found.append(Recipe(path.stem, command, description))
    return found


def is_name(text: str) -> bool:
    """Whether `text` names a shipped configuration, such as quickstart or method/sdpo, and is not a path."""
    return not text.endswith((".yaml", ".yml")) and not text.startswith((".", "/", "~"))


def shipped_file(name: str, folder: str = RECIPES) -> Path:
    """The file of a shipped configuration. A name without a slash lies in `folder`. The file may not exist."""
    return configs_dir() / f"{name if '/' in name else f'{folder}/{name}'}.yaml"


def shipped_names(folder: str) -> list[str]:
    """The names in one folder of the shipped configurations: of YAML files without their suffix, and of folders."""
    return sorted(path.stem if path.suffix == ".yaml" else path.name for path in (configs_dir() / folder).iterdir())


def existing_or_shipped(value: str, key: str, folder: str, suffix: str = "") -> Path:
    """The path `value` if it exists, else what rec-dist ships in `folder` by that name.

    Raises UserError if there is neither.
    """
    path, named = expanded(value), configs_dir() / folder / f"{value}{suffix}"
    if path.exists() or not is_name(value):
        return path
    if not named.exists():
        raise UserError(f"{key} ({value}) does not exist; give a path, or one of {', '.join(shipped_names(folder))}")
    return named


def suggestion(name: str) -> str:
    """What to do about a recipe or group that does not exist."""
    folder, _, last = name.rpartition("/")
    known = shipped_names(folder or RECIPES) if (configs_dir() / (folder or RECIPES)).is_dir() else []
    close = difflib.get_close_matches(last, known, n=1)
    meant = f"did you mean {f'{folder}/' if folder else ''}{close[0]}? " if close else ""
    return f"{meant}give the path of a YAML file, or a name that `rec-dist recipes` lists"
