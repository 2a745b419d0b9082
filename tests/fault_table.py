"""Renders the results of a fault matrix run into docs/reliability.md: python tests/fault_table.py RESULTS.jsonl DOCUMENT.md

The tests marked `faults` write RESULTS.jsonl to the path in the variable REC_DIST_FAULTS. `make test-faults` does both.
"""

import json
import sys
from pathlib import Path
from typing import Any

from benchmarks import results

BEGIN, END = "<!-- faults: begin, written by make test-faults -->", "<!-- faults: end -->"


def cell(rows: list[dict[str, Any]]) -> str:
    """The last result of each case: a repeat replaces earlier ones."""
    if not rows:
        return "not run"
    row = rows[-1]
    restarts = f", {row['restarts']} restart" if row["restarts"] else ""
    return f"{'same' if row['passed'] else 'FAILED'}{restarts}, {row['seconds']:.0f} s"


def tables(rows: list[dict[str, Any]]) -> str:
    """A table of kinds by phases and ranks, a table of everything else, and the stamp."""
    matrix = [row for row in rows if row["rank"] != ""]
    others = [row for row in rows if row["rank"] == ""]
    keys = list(dict.fromkeys((row["where"], row["fault"]) for row in matrix))
    grid = [
        {"where": where, "fault": fault}
        | {
            f"rank {rank}": cell([row for row in matrix if (row["where"], row["fault"], row["rank"]) == (where, fault, rank)])
            for rank in (0, 1)
        }
        for where, fault in keys
    ]
    latest = {(row["fault"], row["where"]): row for row in others}
    rest = [
        {"fault": row["fault"], "of": row["where"], "what happened": row["outcome"] or "FAILED", "s": f"{row['seconds']:.0f}"}
        for row in latest.values()
    ]
    passed = sum(row["passed"] for row in {row["test"]: row for row in rows}.values())
    head = f"{passed} of {len({row['test'] for row in rows})} cases that ran passed."
    stamp = results.stamp(results.facts("make test-faults"))
    return "\n\n".join([head, *(results.table(part, markdown=True) for part in (grid, rest) if part), stamp])


def main(source: Path, document: Path) -> None:
    """Puts the tables between the two marks."""
    rows = [json.loads(line) for line in source.read_text(encoding="utf-8").splitlines()]
    text = document.read_text(encoding="utf-8")
    before, _, rest = text.partition(BEGIN)
    _, found, after = rest.partition(END)
    assert found, f"{document} lacks the marks {BEGIN} and {END}"
    document.write_text(f"{before}{BEGIN}\n{tables(rows)}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
