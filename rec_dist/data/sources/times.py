"""Timestamps of any type as whole numbers of the source's unit and their fractions, so that no order is lost.

Numbers keep their unit: seconds, ms, us, ns. Columns of dates and times keep theirs. Dates as text (ISO 8601) become seconds since
1970; without a zone they are in UTC. A fraction is a count of 1e-18 of the unit. R rows of a column.
"""

from dataclasses import dataclass
from datetime import datetime
from typing import NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from rec_dist.data.sources.interactions import Bool
from rec_dist.runtime.arrays import F64, I64

DIGITS = 18  # of a fraction
_DECIMAL = r"^(?P<sign>[+-]?)(?P<whole>\d{0,19})(?:\.(?P<part>\d*))?$"
_NUMBER = r"^[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?$"
_DAY, _CLOCK, _ZONE = (
    r"(?P<day>\d{4}-\d{2}-\d{2})",
    r"(?P<clock>\d{2}:\d{2}(?::\d{2})?)",
    r"(?P<zone>Z|z|UTC|[+-][01]\d(?::?[0-5]\d)?)?",
)
_ISO = rf"^{_DAY}(?:[Tt ]{_CLOCK}(?:[.,](?P<part>\d+))?)?\s*{_ZONE}$"
_DAY_OR_MONTH = r"^\s*\d{1,2}[/.-]\d{1,2}[/.-]\d{2,4}(\s|$)"
_LARGEST_INT64, _LARGEST_NEGATIVE = "9223372036854775807", "9223372036854775808"
_LARGEST_FLOAT = 2.0**62
_LOOKED_AT = 1000  # rows that decide whether a column holds dates


class Times(NamedTuple):
    """whole (R,), and readable (R,): which rows have a timestamp. fraction (R,), 0 <= fraction < 1e18; None if all are 0."""

    whole: I64
    fraction: I64 | None
    readable: Bool


@dataclass(frozen=True)
class TimeFacts:
    """Of some rows: the largest magnitude of a timestamp, and how many have a fraction."""

    largest: int = 0
    fractional: int = 0

    def joined(self, other: "TimeFacts") -> "TimeFacts":
        """Those of both."""
        return TimeFacts(max(self.largest, other.largest), self.fractional + other.fractional)

    @property
    def digits(self) -> int:
        """How many decimal digits of the fractions are kept: as many as 64 bits hold; 0 without fractions.

        >>> TimeFacts(1_600_000_000, 3).digits, TimeFacts(0, 3).digits, TimeFacts(1_600_000_000, 0).digits
        (9, 18, 0)
        """
        fitting = (digits for digits in range(DIGITS, 0, -1) if (self.largest + 1) * 10**digits < 2**63)
        return next(fitting, 0) if self.fractional else 0

    def notes(self) -> list[str]:
        """The line about fractions for the manifest."""
        if not self.fractional:
            return []
        return [f"{self.fractional} timestamps have a fraction: all are stored in units of 1e-{self.digits} of the source's"]


def facts_of(times: Times, kept: Bool) -> TimeFacts:
    """The facts about the rows where kept (R,) is true."""
    whole = times.whole[kept]
    largest = max(abs(int(whole.min())), abs(int(whole.max()))) if len(whole) else 0
    return TimeFacts(largest, 0 if times.fraction is None else int((times.fraction[kept] > 0).sum()))


def scaled(whole: I64, fraction: I64 | None, digits: int) -> I64:
    """Timestamps (R,) in units of 10**-digits."""
    if not digits:
        return whole
    found: I64 = whole * 10**digits
    return found if fraction is None else found + fraction // 10 ** (DIGITS - digits)


def holds_dates(column: pa.ChunkedArray) -> bool:
    """Whether a column of text holds dates. The first cell that is a date or a number decides."""
    if not _is_text(column):
        return False
    head = pc.utf8_trim_whitespace(column.slice(0, _LOOKED_AT))
    dates, numbers = (pc.fill_null(pc.match_substring_regex(head, kind), False).to_pylist() for kind in (_ISO, _NUMBER))
    return next((date for date, number in zip(dates, numbers, strict=True) if date or number), False)


def has_open_order(column: pa.ChunkedArray) -> Bool:
    """(R,): which texts are dates such as 01/02/2024, of which nothing says whether the day or the month is first."""
    if not _is_text(column):
        return np.zeros(len(column), dtype=bool)
    found: Bool = pc.fill_null(pc.match_substring_regex(column, _DAY_OR_MONTH), False).to_numpy()
    return found


def read_times(column: pa.ChunkedArray, *, dates: bool) -> Times:
    """The timestamps of a column. dates: text holds dates and not numbers."""
    if pa.types.is_decimal(column.type):
        column = pc.cast(column, pa.string())
    if not _is_text(column):
        return _of_types(column)
    column = pc.fill_null(pc.cast(column, pa.string()), "")
    return _of_dates(column) if dates else _of_numbers(column)


def read_floats(column: pa.ChunkedArray) -> tuple[F64, Bool]:
    """A column as (R,) float64, and which values are finite numbers."""
    if not _is_text(column):
        values = pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy()
        return values, np.isfinite(values)
    column = pc.fill_null(column, "")
    try:
        values = pc.cast(column, pa.float64()).to_numpy()
    except pa.ArrowInvalid:
        number = pc.match_substring_regex(column, _NUMBER)
        values = pc.cast(pc.if_else(number, column, "nan"), pa.float64()).to_numpy()
    return values, np.isfinite(values)


def _of_types(column: pa.ChunkedArray) -> Times:
    readable = pc.is_valid(column).to_numpy()
    if pa.types.is_floating(column.type):
        return _of_floats(pc.fill_null(pc.cast(column, pa.float64()), float("nan")).to_numpy())
    if pa.types.is_date32(column.type) or pa.types.is_time32(column.type):
        column = pc.cast(column, pa.int32())
    if pa.types.is_uint64(column.type):
        readable &= pc.fill_null(pc.less_equal(column, pa.scalar(2**63 - 1, pa.uint64())), False).to_numpy()
        column = pc.if_else(pa.array(readable), column, pa.scalar(0, pa.uint64()))
    return Times(pc.fill_null(pc.cast(column, pa.int64()), 0).to_numpy(), None, readable)


def _of_floats(values: F64) -> Times:
    readable = np.isfinite(values) & (np.abs(np.where(np.isfinite(values), values, 0)) < _LARGEST_FLOAT)
    values = np.where(readable, values, 0)
    floor = np.floor(values)
    part = (values - floor).astype(np.longdouble) * 10**DIGITS  # a float64 would lose the last bits of a value below 1
    return _times(floor.astype(np.int64), np.minimum(np.rint(part), 10**DIGITS - 1).astype(np.int64), readable)


def _of_numbers(column: pa.ChunkedArray) -> Times:
    # A cell must mean the same whatever the other rows hold. Arrow's cast accepts 0x1F and +5, but the slow way does not.
    if not pc.any(pc.match_substring_regex(column, r"[^0-9-]")).as_py():
        try:
            return Times(pc.cast(column, pa.int64()).to_numpy(), None, np.ones(len(column), dtype=bool))
        except pa.ArrowInvalid:
            pass
    found = pc.extract_regex(column, _DECIMAL)
    sign, whole, part = (pc.fill_null(pc.struct_field(found, [name]), "") for name in ("sign", "whole", "part"))
    largest = pc.if_else(pc.equal(sign, "-"), _LARGEST_NEGATIVE, _LARGEST_INT64)
    short = pc.less(pc.binary_length(whole), len(_LARGEST_INT64))
    some = pc.greater(pc.add(pc.binary_length(whole), pc.binary_length(part)), 0)
    exact = pc.and_(some, pc.or_(short, pc.less_equal(whole, largest)))
    minus = pc.equal(sign, "-").to_numpy()
    digits = pc.if_else(pc.and_(exact, pc.greater(pc.binary_length(whole), 0)), whole, "0")
    values = pc.cast(pc.binary_join_element_wise(pc.if_else(pc.equal(sign, "-"), "-", ""), digits, ""), pa.int64()).to_numpy()
    fraction = _fraction(pc.if_else(exact, part, ""))
    under = minus & (fraction > 0)  # -1.5 is 0.5 above -2
    is_exact: Bool = exact.to_numpy()
    readable = is_exact & ~(under & (values == np.iinfo(np.int64).min))
    values, fraction = values - under, np.where(under, 10**DIGITS - fraction, fraction)
    if is_exact.all():
        return _times(values, fraction, readable)
    floats = _of_floats(np.where(is_exact, 0, read_floats(column)[0]))
    other = floats.readable & ~is_exact & pc.match_substring_regex(column, _NUMBER).to_numpy()
    rest = np.zeros(len(other), dtype=np.int64) if floats.fraction is None else floats.fraction
    return _times(np.where(is_exact, values, floats.whole), np.where(is_exact, fraction, rest), readable | other)


def _of_dates(column: pa.ChunkedArray) -> Times:
    found = pc.extract_regex(pc.utf8_trim_whitespace(column), _ISO)
    day, clock, part, zone = (pc.fill_null(pc.struct_field(found, [name]), "") for name in ("day", "clock", "part", "zone"))
    clock = pc.if_else(pc.equal(clock, ""), "00:00", clock)
    text = pc.binary_join_element_wise(day, clock, "T")
    readable: Bool = pc.not_equal(day, "").to_numpy()
    try:
        text = pc.if_else(pa.array(readable), text, "1970-01-01T00:00")
        whole = pc.cast(pc.cast(text, pa.timestamp("s")), pa.int64()).to_numpy()
    except pa.ArrowInvalid:  # a day that no calendar has
        readable = readable & np.array([_is_date(cell) for cell in text.to_pylist()], dtype=bool)
        text = pc.if_else(pa.array(readable), text, "1970-01-01T00:00")
        whole = pc.cast(pc.cast(text, pa.timestamp("s")), pa.int64()).to_numpy()
    offsets = {name: _offset(name) for name in pc.unique(zone).to_pylist()}
    if any(offsets.values()):
        whole = whole - np.array([offsets[name] for name in zone.to_pylist()], dtype=np.int64)
    return _times(whole, _fraction(part), readable)


def _is_date(text: str) -> bool:
    try:
        datetime.fromisoformat(text)
    except ValueError:
        return False
    return True


def _offset(zone: str) -> int:
    """The seconds of a zone such as +05:30 ahead of UTC."""
    digits = zone.lstrip("+-").replace(":", "")
    if not digits.isdigit():
        return 0
    seconds = 3600 * int(digits[:2]) + 60 * int(digits[2:] or 0)
    return -seconds if zone.startswith("-") else seconds


def _fraction(part: pa.ChunkedArray) -> I64:
    filled = pc.utf8_rpad(pc.utf8_slice_codeunits(part, 0, DIGITS), DIGITS, "0")
    found: I64 = pc.cast(filled, pa.int64()).to_numpy()
    return found


def _times(whole: I64, fraction: I64, readable: Bool) -> Times:
    return Times(whole, fraction if fraction.any() else None, readable)


def _is_text(column: pa.ChunkedArray) -> bool:
    return bool(pa.types.is_string(column.type) or pa.types.is_large_string(column.type))
