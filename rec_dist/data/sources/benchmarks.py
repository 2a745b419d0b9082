"""The files of MiniOneRec and of BEAR (also MSL): rows of a history and its target for training, validation and test, and titles.

A file belongs to a part (train, valid, test, info) if its folder or a word of its name says so: train/Industrial_and_Scientific_5.csv
and Industrial_and_Scientific.train.csv.gz are the same. The titles are MiniOneRec's info file (semantic id, title, item, separated
by tabs) or BEAR's id2name4Rec.json (item -> title).
"""

import json
from dataclasses import dataclass
from pathlib import Path

from rec_dist.data.sources.assemble import unique_items
from rec_dist.data.sources.blocks import files_of, read_buffer, whole
from rec_dist.data.sources.history_rows import BEAR, MINIONEREC, Layout
from rec_dist.data.sources.interactions import BadRows, ItemTable
from rec_dist.data.sources.packed import plain_suffix
from rec_dist.data.sources.table import parse_table
from rec_dist.data.sources.text import Cleaning
from rec_dist.errors import UserError

BENCHMARKS: dict[str, Layout] = {"minionerec": MINIONEREC, "bear": BEAR}
_PARTS = ("train", "valid", "test")
_ITEMS = {"minionerec": ("info", ".txt"), "bear": ("id2name4Rec", ".json")}  # the word in the name, and the suffix


@dataclass(frozen=True)
class Benchmark:
    """The files of one category. parts: those of train, valid and test that exist."""

    folder: Path
    items: Path
    parts: dict[str, Path]

    def part(self, name: str, key: str) -> Path:
        """The file of a part. Raises UserError that names `key` if the folder has none."""
        if name not in self.parts:
            there = ", ".join(self.parts) or "none"
            raise UserError(
                f"{key}: {self.folder} has no {name} file (it has {there}); name a part that exists, or add the file."
            )
        return self.parts[name]


def find_benchmark(folder: Path, format_name: str, category: str | None) -> Benchmark:
    """Finds the files of `category` in a folder and the folders in it.

    Raises UserError if there is no file of titles, or if a part has several files.
    """
    if not folder.is_dir():
        raise UserError(f"data.source ({folder}) is not a folder; data.format={format_name} takes the folder of its files.")
    word, suffix = _ITEMS[format_name]
    inside = sorted(path for path in folder.iterdir() if path.is_dir())
    found: dict[str, list[Path]] = {name: [] for name in (*_PARTS, word)}
    for path in (path for place in (folder, *inside) for path in files_of(place)):
        words = {path.parent.name, *path.name.split(".")} if path.parent != folder else set(path.name.split("."))
        if category is not None and not path.name.startswith(category) and path.parent.name != category:
            continue
        for name in found:
            if name in words and plain_suffix(path) == (suffix if name == word else ".csv"):
                found[name].append(path)
    for name, files in found.items():
        if len(files) > 1:
            names = ", ".join(str(path.relative_to(folder)) for path in files[:4])
            raise UserError(
                f"data.source ({folder}) holds {len(files)} {name} files ({names}); set data.category to the beginning of their "
                "names"
            )
    if not found[word]:
        of = "" if category is None else f" of data.category={category}"
        raise UserError(
            f"data.source ({folder}) holds no file of titles{of} for data.format={format_name}: a {word} file, {suffix}"
        )
    return Benchmark(folder, found[word][0], {name: found[name][0] for name in _PARTS if found[name]})


def read_benchmark_items(path: Path, format_name: str, bad: BadRows, notes: list[str], *, clean_text: bool = True) -> ItemTable:
    """The whole catalogue in the order of the file. An item without a title keeps its name as title, and a note says so."""
    clean = Cleaning("titles", clean_text)
    if format_name == "minionerec":
        table = parse_table(whole(bad.file, path), bad, names=["semantic_id", "title", "item_id"], delimiter="\t")
        raw, titles = table.texts("item_id"), table.texts("title")
        items = unique_items(table, "item_id", _items(raw, titles, clean), bad)
    else:
        try:
            names = json.loads(read_buffer(path).to_pybytes())
        except (ValueError, RecursionError):
            names = None
        if not isinstance(names, dict) or not all(isinstance(title, str) for title in names.values()):
            raise UserError(f"{path} is not one JSON object of item -> title; download the file again.")
        items = _items(list(names), list(names.values()), clean)
    untitled = sum(raw == title for raw, title in zip(items.raw, items.titles, strict=True))
    if untitled:
        notes.append(f"{path.name}: {untitled} items have no title: their names are used as titles")
    notes += clean.notes()
    return items


def _items(raw: list[str], titles: list[str], clean: Cleaning) -> ItemTable:
    plain = [clean(title).strip() or name for name, title in zip(raw, titles, strict=True)]
    return ItemTable(raw, plain, [None] * len(raw), [[] for _ in raw])
