"""Recognises the format of a source, finds its files and opens them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

from rec_dist.data.sources.amazon import find_amazon, open_amazon
from rec_dist.data.sources.blocks import files_of
from rec_dist.data.sources.book_crossing import BOOKS, RATINGS, find_book_crossing, open_book_crossing
from rec_dist.data.sources.columns import open_csv
from rec_dist.data.sources.interactions import Interactions
from rec_dist.data.sources.movielens import LAYOUTS, open_movielens
from rec_dist.data.sources.packed import plain_suffix
from rec_dist.data.sources.parquet import open_parquet
from rec_dist.data.sources.preferences import SUFFIXES, find_preferences
from rec_dist.data.sources.recbole import open_recbole
from rec_dist.data.sources.source import Source, read_all
from rec_dist.errors import UserError
from rec_dist.storage.location import Stored
from rec_dist.storage.uri import shown

_TEXT_TABLES = (".csv", ".tsv")
_PARQUET = ".parquet"
_OTHERS = (".inter", ".item", ".json", ".jsonl", _PARQUET)


@dataclass(frozen=True)
class SourceStore:
    """The store of a source. uri: its folder. copied_to: the folder of the copies, which the messages of readers name.

    before: what the store said of each file before it was copied.
    """

    uri: str
    copied_to: Path
    before: tuple[Stored | None, ...] = ()

    def name(self, path: Path) -> str:
        """The name of the file, below `uri`, that was copied to `path`."""
        return path.relative_to(self.copied_to).as_posix()

    def renamed(self, text: str) -> str:
        """A message that names the URI in place of the folder of the copies."""
        return text.replace(str(self.copied_to), shown(self.uri))


@dataclass(frozen=True)
class FileSet:
    """A format (a value of data.format except auto) and its files: interactions first, then items if the format has them.

    name: what messages and notes call the files; None: their paths. store: where the files were copied from, if data.source is a
    URI.
    """

    format: str
    files: list[Path]
    name: str | None = None
    store: SourceStore | None = None


def find_files(source: Path, format_name: str) -> FileSet:
    """Finds the files to read in `source` (a file or a folder); format_name is data.format.

    auto takes the first format that fits: recbole (*.inter), movielens and book_crossing (known pairs of names), amazon
    (reviews in JSON lines), parquet (*.parquet), csv (one .csv or .tsv file). Raises UserError if no file fits, or if several
    do.
    """
    finders = {
        "recbole": _find_recbole,
        "movielens": _find_movielens,
        "book_crossing": find_book_crossing,
        "amazon": find_amazon,
        "parquet": _find_parquet,
        "csv": _find_csv,
    }
    if format_name == "preferences" and (files := find_preferences(source)):
        return _readable(FileSet(format_name, files))
    for name, finder in finders.items():
        if format_name in (name, "auto"):
            files = finder(source)
            if files:
                return _readable(FileSet(name, files))
    pairs = ", ".join(f"{layout.ratings} + {layout.movies}" for layout in LAYOUTS)
    expected = {
        "recbole": "one NAME.inter and its NAME.item",
        "movielens": pairs,
        "book_crossing": f"{RATINGS} + {BOOKS}",
        "amazon": "one NAME.json or NAME.jsonl (or .gz) and its meta_NAME",
        "parquet": ".parquet files",
        "csv": "one .csv or .tsv file",
    }
    wanted = expected.get(format_name, "; or ".join(expected.values()))
    if format_name == "preferences":
        wanted = f"one file of {', '.join(SUFFIXES)} (or .gz)"
    raise UserError(f"data.source ({source}) holds no files for data.format={format_name}; expected {wanted}.")


def open_source(found: FileSet, columns: Mapping[str, str], *, clean_text: bool = True) -> Source:
    """Opens the files. Their rows are read later, a block at a time. columns: data.columns (for csv, parquet and recbole)."""
    source = replace(_opened(found, columns), clean_text=clean_text)
    if found.store is None:
        return source
    uri, name = found.store.uri, found.store.name
    return replace(source, files=[replace(block, stored=(uri, name(block.data))) for block in source.files])


def _opened(found: FileSet, columns: Mapping[str, str]) -> Source:
    if found.format in ("movielens", "book_crossing", "amazon") and columns:
        raise UserError(f"data.columns has no effect on data.format={found.format}; remove it, or set data.format=csv.")
    second = found.files[1] if len(found.files) > 1 else None
    if found.format == "movielens":
        return open_movielens(found.files[0], found.files[1])
    if found.format == "book_crossing":
        return open_book_crossing(found.files[0], found.files[1])
    if found.format == "recbole":
        return open_recbole(found.files[0], second, columns)
    if found.format == "amazon":
        return open_amazon(found.files[0], second)
    if found.format == "parquet":
        opened = open_parquet(found.files, columns)
        if found.name is None:
            return opened
        return replace(opened, files=[replace(block, path=Path(found.name)) for block in opened.files])
    return open_csv(found.files[0], columns)


def read_interactions(found: FileSet, columns: Mapping[str, str], max_bad_rows: int) -> Interactions:
    """Reads the files into memory. Raises UserError if more than max_bad_rows rows are unreadable."""
    return read_all(open_source(found, columns), max_bad_rows)


def _readable(found: FileSet) -> FileSet:
    """Raises UserError if one of the files is not a regular file but a broken link, a pipe or a device."""
    for path in found.files:
        if not path.is_file():
            raise UserError(
                f"data.source: {path} is not a file that can be read twice (a broken link, a pipe?); put a file there."
            )
    return found


def _one(source: Path, files: list[Path], kind: str) -> list[Path]:
    if len(files) > 1:
        names = ", ".join(path.name for path in files[:4])
        raise UserError(
            f"data.source ({source}) holds {len(files)} {kind} files ({names}); name one of them instead of the folder."
        )
    return files


def _find_recbole(source: Path) -> list[Path]:
    if source.is_dir():
        found = _one(source, [path for path in files_of(source) if path.suffix == ".inter"], ".inter")
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


def _find_parquet(source: Path) -> list[Path]:
    return [path for path in files_of(source) if path.suffix == _PARQUET]


def _find_csv(source: Path) -> list[Path]:
    if source.is_dir():
        return _one(
            source,
            [path for path in files_of(source) if plain_suffix(path) in _TEXT_TABLES],
            " or ".join(_TEXT_TABLES),
        )
    # A file that you name directly is read whatever its suffix, unless the suffix belongs to another format.
    return [] if plain_suffix(source) in _OTHERS else [source]
