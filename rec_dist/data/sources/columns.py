"""Any table with a header. Columns play their roles by their names, or as data.columns says."""

from collections.abc import Mapping
from pathlib import Path

from rec_dist.data.sources.blocks import first_bytes, whole
from rec_dist.data.sources.delimited import DelimitedRows, dates_in
from rec_dist.data.sources.header import read_header
from rec_dist.data.sources.quotes import quoting_of
from rec_dist.data.sources.roles import pick_roles
from rec_dist.data.sources.source import Source

_DELIMITERS = (",", ";", "\t", "|")


def open_csv(path: Path, columns: Mapping[str, str]) -> Source:
    """Opens a csv or tsv file with one interaction per row (UTF-8, header in the first line, quotes as in RFC 4180, also packed).

    The separator is the one of , ; tab | that is most frequent in the header. Without a title column, the raw item name is the
    title. Categories are separated by "|".
    """
    notes: list[str] = []
    line = first_bytes(path).split(b"\n", 1)[0].decode("utf-8-sig", errors="replace")
    delimiter = max(_DELIMITERS, key=line.count)
    names, skip = read_header(path, delimiter, quoted=True)
    roles = pick_roles(path, names, columns, notes)
    quoting = quoting_of(path, delimiter, notes)
    dates = dates_in(path, names, delimiter, quoting, roles.timestamp)
    rows = DelimitedRows(names, delimiter, quoting, roles, dates=dates)
    return Source([whole(0, path, skip)], rows, header_lines=1, notes=notes)
