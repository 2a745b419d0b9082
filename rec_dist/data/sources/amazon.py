"""Amazon Reviews 2018 and 2023: one review per line of JSON, and the titles of products in a file `meta_NAME` beside it.

The fields are reviewerID, asin, overall, unixReviewTime (seconds) in 2018, and user_id, parent_asin, rating, timestamp
(milliseconds) in 2023.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from rec_dist.data.sources.assemble import RowBlock, assemble
from rec_dist.data.sources.blocks import Block, cut_text, files_of, first_bytes, read_block, whole
from rec_dist.data.sources.interactions import BadRows, ItemTable, KnownItems
from rec_dist.data.sources.json_lines import read_json
from rec_dist.data.sources.packed import opened, plain_suffix
from rec_dist.data.sources.roles import Roles
from rec_dist.data.sources.source import Source
from rec_dist.errors import UserError

SUFFIXES = (".json", ".jsonl")
META = "meta_"
_BYTES_A_ROW = 400
_META_CHUNK = 1 << 26
_LONGEST_REVIEW = 1 << 24  # bytes of a line; the text of a review can be longer than 64 KiB
_PAGE = re.compile(r"<span|<script|<!--|getTime\(\)|^\s*var ")  # a piece of the shop's page, which the crawler took for a title


@dataclass(frozen=True)
class _Edition:
    """The field names of one edition: those of a review, and the key and categories of a product."""

    roles: Roles
    key: str
    categories: str


_EDITIONS = (
    _Edition(Roles("reviewerID", "asin", "overall", "unixReviewTime"), "asin", "category"),
    _Edition(Roles("user_id", "parent_asin", "rating", "timestamp"), "parent_asin", "categories"),
)


@dataclass(frozen=True)
class JsonRows:
    """Implements RowReader for lines of JSON objects. Ignores fields that have no role."""

    roles: Roles
    items_path: Path | None

    def read(self, block: Block, known: KnownItems | None) -> RowBlock:
        """Reads the rows of a block of lines."""
        bad = BadRows(block.file)
        types = {self.roles.user: pa.string(), self.roles.item: pa.string()}
        for number, kind in ((self.roles.rating, pa.float64()), (self.roles.timestamp, pa.int64())):
            types |= {number: kind} if number is not None else {}
        data = read_block(block)
        return assemble(
            read_json(data, block.path, pa.schema(types.items()), bad, "review"), self.roles, bad, known, self.items_path
        )

    def cut(self, block: Block, size: int) -> list[Block]:
        """Cuts a file into blocks of whole lines of four times `size`, since lines are longer than rows of delimited text."""
        return cut_text(block, quoted_after=None, size=4 * size)

    def num_rows(self, block: Block) -> int:
        """An estimate from the size of the file."""
        return block.data.stat().st_size // _BYTES_A_ROW + 1


def open_amazon(reviews: Path, meta: Path | None) -> Source:
    """Opens a file of reviews of either edition and its metadata. A review of a product without a title is a bad row.

    Raises UserError if the first line belongs to neither edition.
    """
    edition = _edition(reviews)
    notes: list[str] = []
    items = None
    if meta is None:
        notes.append(f"{META}{reviews.name} does not exist: raw item names are used as titles")
    else:
        if plain_stem(reviews).removesuffix("_5") != plain_stem(meta).removeprefix(META):
            notes.append(f"titles are those of {meta.name}, the only {META} file beside {reviews.name}")
        items = _read_meta(meta, edition, notes)
    return Source([whole(0, reviews)], JsonRows(edition.roles, meta), items=items, notes=notes)


def find_amazon(source: Path) -> list[Path]:
    """Finds the file of reviews and, if it is beside it, the file of metadata. Returns nothing if there are no reviews."""
    found = [path for path in files_of(source) if plain_suffix(path) in SUFFIXES and not path.name.startswith(META)]
    if not found:
        return []
    if len(found) > 1:
        names = ", ".join(path.name for path in found[:4])
        raise UserError(
            f"data.source ({source}) holds {len(found)} .json or .jsonl files ({names}); name one of them instead of the folder."
        )
    metas = [path for path in files_of(found[0].parent) if plain_suffix(path) in SUFFIXES and path.name.startswith(META)]
    stem = plain_stem(found[0])
    for name in (stem, stem.removesuffix("_5")):  # the 5-core of 2018 shares the metadata of the full data set
        if named := [path for path in metas if plain_stem(path) == META + name]:
            return [found[0], named[0]]
    if len(metas) > 1:
        names = ", ".join(path.name for path in metas[:4])
        raise UserError(
            f"data.source ({source}) holds {len(metas)} files of metadata ({names}), and none is named {META}{stem}; rename the one "
            f"that belongs to {found[0].name}."
        )
    return found + metas


def plain_stem(path: Path) -> str:
    """The name of a file up to its first point."""
    return path.name.split(".")[0]


def _edition(path: Path) -> _Edition:
    line = first_bytes(path, _LONGEST_REVIEW).split(b"\n", 1)[0]
    try:
        fields = json.loads(line)
    except (ValueError, RecursionError):
        fields = None
    if isinstance(fields, dict):
        for edition in _EDITIONS:
            if edition.roles.user in fields and edition.roles.item in fields:
                return edition
    wanted = " or ".join(f"{edition.roles.user} and {edition.roles.item}" for edition in _EDITIONS)
    raise UserError(
        f"{path}:1: this is not a review of Amazon Reviews 2018 or 2023; each line must be a JSON object with {wanted}."
    )


def _read_meta(path: Path, edition: _Edition, notes: list[str]) -> ItemTable:
    """Reads the products with a title, each from its first line, and notes how many others there are."""
    schema = pa.schema({edition.key: pa.string(), "title": pa.string(), edition.categories: pa.list_(pa.string())}.items())
    table = ItemTable([], [], [], [])
    seen: dict[str, int] = {}
    bad = BadRows(file=1)
    num_lines = repeated = unnamed = 0
    for chunk in _line_chunks(path):
        own = BadRows(file=1)
        read = read_json(pa.py_buffer(chunk), path, schema, own, "product")
        bad.merge(own, num_lines)
        num_lines += read.num_lines
        for raw, text, names in zip(*(column.to_pylist() for column in read.columns), strict=True):
            title = "" if text is None or _PAGE.search(text) else text.strip()
            if not raw:
                unnamed += 1
                continue
            place = seen.setdefault(raw, len(table))
            if place == len(table):
                table.raw.append(raw)
                table.titles.append(title)
                table.years.append(None)
                table.categories.append([name for name in names or [] if name])
                continue
            repeated += 1
            table.titles[place] = table.titles[place] or title
    if not table and bad.counts:
        raise UserError(f"no line of {path} can be read: {bad.describe()}; write a JSON object of a product on each line.")
    untitled = unnamed + sum(not title for title in table.titles)
    if untitled or repeated:
        notes.append(f"{path.name}: {untitled} products without a title and {repeated} repeated ones are left out")
    if bad.counts:
        notes.append(f"lines of metadata left out: {bad.describe()}")
    return table


def _line_chunks(path: Path) -> Iterator[bytes]:
    with opened(path) as handle:
        while chunk := handle.read(_META_CHUNK):
            yield chunk + handle.readline()
