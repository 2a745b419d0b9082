"""Which format a source is in, which of its files are read, and the one call that reads them."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from rec_dist.data.interactions import Interactions
from rec_dist.data.readers.columns import read_columns
from rec_dist.data.readers.movielens import LAYOUTS, read_movielens
from rec_dist.data.readers.recbole import read_recbole
from rec_dist.runtime.errors import UserError

_TEXT_TABLES = (".csv", ".tsv")


@dataclass(frozen=True)
class FileSet:
    """A format ("recbole", "movielens" or "csv") and its files: interactions first, then items where the format has them."""

    format: str
    files: list[Path]


def find_files(source: Path, format_name: str) -> FileSet:
    """Finds the files to read in `source` (a file or a folder); format_name is data.format.

    auto takes the first that fits of recbole (*.inter), movielens (a known pair of names), csv (one .csv or .tsv file).
    UserError: nothing fits, or several files do.
    """
    finders = {"recbole": _find_recbole, "movielens": _find_movielens, "csv": _find_csv}
    for name, finder in finders.items():
        if format_name in (name, "auto"):
            files = finder(source)
            if files:
                return FileSet(name, files)
    pairs = ", ".join(f"{layout.ratings} + {layout.movies}" for layout in LAYOUTS)
    expected = {
        "recbole": "one NAME.inter and its NAME.item",
        "movielens": pairs,
        "csv": "one .csv or .tsv file",
    }
    wanted = expected.get(format_name, "; or ".join(expected.values()))
    raise UserError(f"data.source ({source}) holds no files for data.format={format_name}; expected {wanted}.")


def read_interactions(found: FileSet, columns: Mapping[str, str], max_bad_rows: int) -> Interactions:
    """Reads the files. columns is data.columns (csv, recbole); more than max_bad_rows unreadable rows are a UserError."""
    if found.format == "movielens":
        if columns:
            raise UserError("data.columns has no effect on data.format=movielens; remove it, or set data.format=csv.")
        return read_movielens(found.files[0], found.files[1], max_bad_rows)
    if found.format == "recbole":
        return read_recbole(found.files[0], found.files[1] if len(found.files) > 1 else None, columns, max_bad_rows)
    return read_columns(found.files[0], columns, max_bad_rows)


def _one(source: Path, files: list[Path], kind: str) -> list[Path]:
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(
            f"data.source ({source}) holds {len(files)} {kind} files ({names}); name one of them instead of the folder."
        )
    return files


def _find_recbole(source: Path) -> list[Path]:
    if source.is_dir():
        found = _one(source, sorted(source.glob("*.inter")), ".inter")
    else:
        found = [source] if source.suffix == ".inter" else []
    return found + [path.with_suffix(".item") for path in found if path.with_suffix(".item").is_file()]


def _find_movielens(source: Path) -> list[Path]:
    folder = source if source.is_dir() else source.parent
    for layout in LAYOUTS:
        if source != folder and source.name != layout.ratings:
            continue
        files = [folder / layout.ratings, folder / layout.movies]
        if all(path.is_file() for path in files):
            return files
    return []


def _find_csv(source: Path) -> list[Path]:
    if source.is_dir():
        return _one(
            source,
            sorted(path for path in source.iterdir() if path.suffix in _TEXT_TABLES),
            " or ".join(_TEXT_TABLES),
        )
    # A file that is named outright is read whatever its suffix, but only where nothing else claims it.
    return [] if source.suffix in (".inter", ".item") else [source]
