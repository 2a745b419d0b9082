"""The tables of a GPU suite's result: one for each section, the targets, and last a short one that says how each section went."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

from benchmarks import gpu_targets, results

Row = dict[str, Any]

# Section -> the columns of its table. "ms", "peak GiB" and "note" are computed.
COLUMNS: dict[str, tuple[str, ...]] = {
    "attention": ("method", "logps apart", "gradients apart", "compilations after the second micro-batch"),
    "kernels": ("op", "kind", "dtype", "V", "D", "M", "results", "rejected", "why"),
    "head": ("V", "M", "weight", "method", "ms", "peak GiB", "x GEMMs"),
    "peers": (
        *("model", "tokens a micro-batch", "P", "K", "method", "groups", "tokens", "ms", "peak GiB"),
        *("groups/s", "tokens/s", "mfu", "d is x"),
    ),
    "engine": (
        *("model", "tokens a micro-batch", "engine", "ZeRO", "GPUs", "layers", "tokens", "ms", "held GiB", "peak GiB"),
        *("groups/s", "tokens/s", "mfu"),
    ),
    "fused": ("method", "dtype", "plain from truth", "fused from truth", "excess in tolerances", "ms", "peak GiB"),
    "memory": ("model", "tokens a micro-batch", "engine", "peak GiB", "planned GiB", "planned / measured"),
    "compilations": ("method", "rows", "training", "scoring"),
    "waits": ("engine", "waits", "a micro-batch"),
    "loader": ("processes", "equal", "pinned", "sent", "ms a step"),
}


def report(result: Row, *, markdown: bool = False) -> str:
    """All tables of a result. Raises KeyError if it is not one of this suite."""
    rows, device = result["rows"], result["device"]
    parts = []
    for section, columns in COLUMNS.items():
        own = [_shown(row, columns) for row in rows if row["section"] == section]
        if own:
            parts.append(f"{section}\n\n{results.table(own, markdown=markdown)}")
    places = [place for row in rows if row["section"] == "waits" for place in row.get("places", ()) if place["waits"]]
    if places:
        parts.append(results.table(places, markdown=markdown))
    parts.append(results.table([verdict.row() for verdict in gpu_targets.verdicts(rows)], markdown=markdown))
    parts.append(results.table(summary(rows), markdown=markdown))
    ended = "" if result["finished"] else "The run did not end: rows are missing.\n"
    return "\n\n".join([*parts, f"{ended}Device: {device}. {results.stamp(result)}"])


def summary(rows: Sequence[Row]) -> list[Row]:
    """How many rows of each section were measured, and how many were not for which reason."""
    out = []
    for section in dict.fromkeys(row["section"] for row in rows):
        kinds = Counter(row["status"].partition(":")[0] for row in rows if row["section"] == section)
        out.append({"section": section, **{kind: kinds[kind] for kind in ("measured", "failed", "skipped", "not measured")}})
    return out


def _shown(row: Row, columns: Sequence[str]) -> Row:
    gib = {name: row[key] / 2**30 if row.get(key) is not None else None for name, key in _BYTES.items()}
    values = {**row, **gib, "ms": row.get("milliseconds", {}).get("median")}
    note = "" if row["status"] == "measured" else row["status"]
    return {**{name: values.get(name) for name in columns}, "note": note}


_BYTES = {"peak GiB": "peak_bytes", "held GiB": "held_bytes", "planned GiB": "planned_bytes"}
