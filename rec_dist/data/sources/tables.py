"""Tables in memory (pandas, Arrow) in place of files: written as one Parquet file that the Parquet reader takes.

The file holds only the columns that have a role, named after it. So equal contents give equal bytes, whatever the columns were
called and however the table was built. (Another pyarrow release may write other bytes: then prepare the data set anew.)
Cost: writing the rows once, about 20 bytes a row, and about 1 s for 10 million rows.
"""

import logging
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rec_dist.data.sources.formats import FileSet
from rec_dist.data.sources.header import refuse_twins
from rec_dist.data.sources.parquet import can_be
from rec_dist.data.sources.roles import NAMES, check_roles, chosen, pick, say_taken
from rec_dist.data.sources.table import as_text, is_list
from rec_dist.errors import UserError, one_line

logger = logging.getLogger(__name__)

NAME = "interactions"
_ROW_GROUP = 1 << 20  # rows; fixed, so that equal tables make equal files
_OF_INTERACTIONS = ("user", "item", "rating", "timestamp")
_OF_ITEMS = ("title", "categories", "year")


def write_tables(interactions: Any, items: Any, columns: Mapping[str, str], folder: Path) -> FileSet:
    """Writes both tables into `folder` as one file of interactions, and returns it as a source.

    interactions: a row each, in file order: user, item and, where they exist, rating and timestamp; also title, categories and
    year when there is no `items`. items: a row an item: item, and title, categories (a list, or text separated by "|"), year;
    or None. columns: data.columns, role -> column; a role without an entry is played by a column with one of its names (roles.py).
    Raises UserError for something that is no table, a column that is missing or of a wrong type, and for `items` in which an item
    stands twice, is missing or has no id.
    """
    check_roles(columns)
    rows = _arrow(interactions, "interactions")
    about = None if items is None else _arrow(items, "items")
    roles = NAMES if about is None else _OF_INTERACTIONS
    taken = pick("interactions", rows.column_names, _named(columns, roles), roles)
    found = {role: _column(rows, name, role, "interactions") for role, name in taken.items()}
    notes: list[str] = []
    say_taken("interactions", taken, columns, notes)
    if about is not None:
        own = {role: name for role, name in columns.items() if role in ("item", *_OF_ITEMS) and name in about.column_names}
        key = chosen("items", about.column_names, own, "item", required=True)
        described = {role: chosen("items", about.column_names, _named(columns, _OF_ITEMS), role) for role in _OF_ITEMS}
        say_taken("items", {"item": key, **described}, columns, notes)
        found |= _from_items(found["item"], key, described, about)
    for note in notes:
        logger.info(note)
    table = pa.table({role: column for role, column in found.items() if column is not None})
    path = folder / f"{NAME}.parquet"
    pq.write_table(table, path, row_group_size=_ROW_GROUP, compression="zstd")
    return FileSet("parquet", [path], name=NAME)


def _arrow(value: Any, name: str) -> pa.Table:
    """`value` as an Arrow table without an index and without metadata."""
    try:
        if isinstance(value, pa.Table):
            table = value
        elif isinstance(value, pa.RecordBatch):
            table = pa.Table.from_batches([value])
        elif type(value).__module__.partition(".")[0] == "pandas" and hasattr(value, "columns"):
            table = pa.Table.from_pandas(value, preserve_index=False)
        elif hasattr(value, "__arrow_c_stream__"):
            table = pa.table(value)
        else:
            raise UserError(
                f"{name} is of type {type(value).__name__}; give a pandas or Arrow table, or leave it out and set data.source"
            )
    except (pa.ArrowException, ValueError, TypeError) as fault:
        if isinstance(fault, UserError):
            raise
        raise UserError(f"{name} cannot become an Arrow table ({one_line(fault)}); give its columns one type each") from fault
    refuse_twins(name, table.column_names)
    return table.replace_schema_metadata(None)


def _named(columns: Mapping[str, str], roles: Iterable[str]) -> dict[str, str]:
    return {role: columns[role] for role in roles if role in columns}


def _column(table: pa.Table, name: str | None, role: str, where: str) -> pa.ChunkedArray | None:
    """The column of a role, or None where the table has none. UserError: the type does not fit."""
    if name is None:
        return None
    column = table.column(name)
    if not can_be(role, column.type):
        raise UserError(
            f"{where}: the column {name} is of type {column.type}, which cannot be a {role}; make it a number or text, or let "
            f"data.columns.{role} name another"
        )
    return column


def _from_items(
    item: pa.ChunkedArray | None, key: str | None, described: Mapping[str, str | None], about: pa.Table
) -> dict[str, pa.Array | pa.ChunkedArray | None]:
    """Title, categories and year of every interaction's item. Texts are dictionaries: a title is stored once, not once a row."""
    keys = _texts(_column(about, key, "item", "items"), "items", key)
    if keys.null_count:
        raise UserError(
            f"items: column {key} is empty in {keys.null_count} of {len(keys)} rows; give each item its id, or drop them"
        )
    if pc.count_distinct(keys).as_py() != len(keys):
        counts = pc.value_counts(keys).to_pylist()
        twice = next(entry["values"] for entry in counts if entry["counts"] > 1)
        raise UserError(f"items: the item {twice!r} stands twice in column {key}; keep one row of each item")
    wanted = _texts(item, "interactions", "item")
    index = pc.index_in(wanted, value_set=keys)
    lost = wanted.filter(pc.and_(pc.is_null(index), pc.not_equal(pc.fill_null(wanted, ""), "")))
    if len(lost):
        raise UserError(
            f"items has no row of the item {lost[0].as_py()!r}, and of {pc.count_distinct(lost).as_py() - 1} other items of "
            "interactions; add them, or leave their interactions out"
        )
    found: dict[str, pa.Array | pa.ChunkedArray | None] = {}
    for role, name in described.items():
        column = _column(about, name, role, "items")
        if column is None or is_list(column.type):
            found[role] = None if column is None else column.take(index)
        else:
            found[role] = pa.DictionaryArray.from_arrays(index, pc.fill_null(_texts(column, "items", name), ""))
    return found


def _texts(column: pa.ChunkedArray | None, where: str, name: str | None) -> pa.Array:
    assert column is not None, "the column has been looked for"
    try:
        text = as_text(column)
    except pa.ArrowException as fault:
        raise UserError(f"{where}: the column {name} cannot become text ({one_line(fault)}); write it as text") from None
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
