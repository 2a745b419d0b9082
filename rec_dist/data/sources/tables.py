"""Tables in memory (pandas, Arrow) in place of files: written as one Parquet file that the Parquet reader takes.

The file holds only the columns that have a role, named after it. So equal contents give equal bytes, whatever the columns were
called and however the table was built. (Another pyarrow release may write other bytes: then prepare the data set anew.)
Cost: writing the rows once, about 20 bytes a row, and about 1 s for 10 million rows.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from rec_dist.data.sources.columns import check_roles
from rec_dist.data.sources.formats import FileSet
from rec_dist.data.sources.header import listed, refuse_twins
from rec_dist.data.sources.parquet import can_be
from rec_dist.data.sources.table import CATEGORY_SEPARATOR
from rec_dist.errors import UserError

NAME = "interactions"
_ROW_GROUP = 1 << 20  # rows; fixed, so that equal tables make equal files
_OF_INTERACTIONS = ("user", "item", "rating", "timestamp")
_OF_ITEMS = ("title", "categories", "year")


def write_tables(interactions: Any, items: Any, columns: Mapping[str, str], folder: Path) -> FileSet:
    """Writes both tables into `folder` as one file of interactions, and returns it as a source.

    interactions: a row each, in file order: user, item and, where they exist, rating and timestamp; also title, categories and
    year when there is no `items`. items: a row an item: item, and title, categories (a list, or text separated by "|"), year;
    or None. columns: data.columns, role -> column; a role without an entry is played by the column of its own name. Raises
    UserError for something that is no table, a column that is missing or of a wrong type, an item that stands twice in `items`
    or is missing there.
    """
    check_roles(columns)
    rows = _arrow(interactions, "interactions")
    about = None if items is None else _arrow(items, "items")
    names = {role: columns.get(role, role) for role in (*_OF_INTERACTIONS, *_OF_ITEMS)}
    _check_named(columns, rows, about)
    chosen = {role: _column(rows, names[role], role, "interactions") for role in _OF_INTERACTIONS}
    if about is None:
        chosen |= {role: _column(rows, names[role], role, "interactions") for role in _OF_ITEMS}
    else:
        chosen |= _from_items(chosen["item"], names, about)
    table = pa.table({role: column for role, column in chosen.items() if column is not None})
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
        raise UserError(
            f"{name} cannot become an Arrow table ({' '.join(str(fault).split())}); give its columns one type each"
        ) from fault
    refuse_twins(name, table.column_names)
    return table.replace_schema_metadata(None)


def _check_named(columns: Mapping[str, str], rows: pa.Table, about: pa.Table | None) -> None:
    """UserError: data.columns names a column that the tables lack."""
    for role, name in columns.items():
        table, where = (rows, "interactions") if about is None or role not in _OF_ITEMS else (about, "items")
        if name not in table.column_names:
            raise UserError(f"data.columns.{role} ({name}) is no column of {where}; its columns are {listed(table.column_names)}")


def _column(table: pa.Table, name: str, role: str, where: str) -> pa.ChunkedArray | None:
    """The column of a role, or None where the table has none. UserError: it must have one, or the type does not fit."""
    if name not in table.column_names:
        if role not in ("user", "item"):
            return None
        raise UserError(
            f"{where} has no column {name}; its columns are {listed(table.column_names)}; rename one, or set data.columns.{role}"
        )
    column = table.column(name)
    if not can_be(role, column.type):
        raise UserError(
            f"{where}: the column {name} is of type {column.type}, which cannot be a {role}; make it a number or text, or let "
            f"data.columns.{role} name another"
        )
    return column


def _from_items(item: pa.ChunkedArray, names: Mapping[str, str], about: pa.Table) -> dict[str, pa.Array | None]:
    """Title, categories and year of every interaction's item, as dictionaries: a title is stored once, not once a row."""
    keys = _texts(_column(about, names["item"], "item", "items"))
    if pc.count_distinct(keys).as_py() != len(keys):
        counts = pc.value_counts(keys).to_pylist()
        twice = next(entry["values"] for entry in counts if entry["counts"] > 1)
        raise UserError(f"items: the item {twice!r} stands twice in column {names['item']}; keep one row of each item")
    wanted = _texts(item)
    index = pc.index_in(wanted, value_set=keys)
    lost = wanted.filter(pc.and_(pc.is_null(index), pc.not_equal(pc.fill_null(wanted, ""), "")))
    if len(lost):
        raise UserError(
            f"items has no row of the item {lost[0].as_py()!r}, and of {pc.count_distinct(lost).as_py() - 1} other items of "
            "interactions; add them, or leave their interactions out"
        )
    found: dict[str, pa.Array | None] = {}
    for role in _OF_ITEMS:
        column = _column(about, names[role], role, "items")
        found[role] = None if column is None else pa.DictionaryArray.from_arrays(index, _texts(column))
    return found


def _texts(column: pa.ChunkedArray | None) -> pa.Array:
    """A column as one array of text; lists are joined by "|"."""
    assert column is not None, "the column has been looked for"
    if pa.types.is_dictionary(column.type):
        column = column.cast(column.type.value_type)
    if pa.types.is_list(column.type) or pa.types.is_large_list(column.type):
        column = pc.binary_join(pc.cast(column, pa.list_(pa.string())), CATEGORY_SEPARATOR)
    text = pc.cast(column, pa.string())
    return text.combine_chunks() if isinstance(text, pa.ChunkedArray) else text
