"""The rates of two trees count the same tokens, leave the first step out, and refuse runs that do not compare."""

from typing import Any

import pytest

from benchmarks import quickstart_rate, results

Rows = list[dict[str, Any]]


def run(tokens: int, seconds: float, *, groups: int = 8, reference: float | None = None) -> Rows:
    """Three steps, the first of them slow."""
    steps: Rows = [
        {"event": "step", "step": step, "groups": groups, "tokens": tokens, "step_seconds": seconds * (9 if step == 1 else 1)}
        for step in (1, 2, 3)
    ]
    passes: Rows = [{"event": "reference", "tokens": tokens, "seconds": reference}] if reference else []
    return [{"event": "start", "time": 0.0}, *passes, *steps]


def found() -> dict[tuple[str, str], list[Rows]]:
    """The older tree runs twice the rows in the same time."""
    return {
        ("sft", "here"): [run(100, 1.0), run(100, 2.0)],
        ("sft", "old"): [run(200, 2.0), run(200, 4.0)],
        ("sdpo", "here"): [run(50, 1.0, reference=0.5)],
        ("sdpo", "old"): [run(100, 1.0, reference=2.0)],
    }


def test_tokens_are_those_of_this_tree_and_the_first_step_does_not_count() -> None:
    rows = quickstart_rate.rows_of(found(), ["here", "old"])
    rates = {(row["stage"], row["tree"]): row["tokens_per_second"] for row in rows}
    assert rates["sft", "here"] == {"median": 75.0, "low": 50.0, "high": 100.0, "n": 2}
    assert rates["sft", "old"] == {"median": 37.5, "low": 25.0, "high": 50.0, "n": 2}
    assert rates["sdpo", "old"]["median"] == 50.0
    assert (rates["reference", "here"]["median"], rates["reference", "old"]["median"]) == (100.0, 25.0)
    about = results.facts(
        "python -m benchmarks.quickstart_rate", rows=[{**row, "dtype": "float32"} for row in rows], load=[0.1, 2]
    )
    lines = quickstart_rate.report(about, markdown=True).splitlines()
    assert "times old" in lines[0] and "| sft " in lines[2]
    assert lines[2].split("|")[-2].strip() == "2"


def test_other_batches_do_not_compare() -> None:
    other = found() | {("sft", "old"): [run(200, 2.0, groups=9), run(200, 4.0)]}
    with pytest.raises(SystemExit, match="other numbers of groups"):
        quickstart_rate.rows_of(other, ["here", "old"])
