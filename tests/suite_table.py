"""Notes in a document that a suite passed: python tests/suite_table.py SUITE JUNIT.xml DOCUMENT.md

The Makefile calls it after `make test-slow`, `make test-faults` and `make test-launch`, which write JUNIT.xml. A suite that failed
changes nothing: the row of its last success stays.
"""

import sys
from pathlib import Path
from xml.etree import ElementTree

from benchmarks import results

BEGIN, END = "<!-- suites: begin, written by make -->", "<!-- suites: end -->"
_HEAD = ("| command | last passed | commit | result | machine |", "|---|---|---|---|---|")


def row_of(suite: str, junit: Path) -> str | None:
    """The row of a suite that passed; None if a test failed or none ran."""
    counts = dict.fromkeys(("tests", "failures", "errors", "skipped"), 0)
    seconds = 0.0
    for part in ElementTree.parse(junit).getroot().iter("testsuite"):
        seconds += float(part.get("time", 0))
        for name in counts:
            counts[name] += int(part.get(name, 0))
    passed = counts["tests"] - counts["failures"] - counts["errors"] - counts["skipped"]
    if counts["failures"] or counts["errors"] or not passed:
        return None
    facts = results.facts(f"make {suite}")
    machine = facts["machine"]
    commit, *changed = str(facts["commit"]).partition("+")
    result = f"{passed} passed, {counts['skipped']} skipped, {seconds / 60:.0f} minutes"
    name = f"{machine['cpu']}, {machine['cpus']} cores"
    return f"| `make {suite}` | {facts['date'][:10]} | {commit[:9]}{''.join(changed)} | {result} | {name} |"


def with_row(text: str, row: str) -> str:
    """The document with this row in place of the one of the same command, or behind the others."""
    before, found, rest = text.partition(BEGIN)
    table, ends, after = rest.partition(END)
    assert found and ends, f"the document lacks the marks {BEGIN} and {END}"
    rows = [line for line in table.strip().splitlines() if line.startswith("| `make ")]
    kept = {line.split("|")[1]: line for line in rows}
    kept[row.split("|")[1]] = row
    return "\n".join([f"{before}{BEGIN}", *_HEAD, *kept.values(), f"{END}{after}"])


def main(suite: str, junit: Path, document: Path) -> int:
    """Returns 0 if the suite passed."""
    row = row_of(suite, junit)
    if row is None:
        return 1
    document.write_text(with_row(document.read_text(encoding="utf-8"), row), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3])))
