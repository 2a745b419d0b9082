"""The benchmark of memory judges the last third against the second, and draws what it measured."""

from pathlib import Path

import numpy as np
import pytest

from benchmarks import memory_growth, results


@pytest.mark.parametrize(
    ("thirds", "expected"),
    [([0.5, 1.0, 1.05], True), ([0.5, 1.0, 1.06], False), ([2.0, 1.0, 0.9], True), ([1.0, 1.0, 1.4], False)],
)
def test_memory_that_still_grows_has_not_levelled_off(thirds: list[float], expected: bool) -> None:
    assert memory_growth.has_levelled_off([third * 1e9 for third in thirds]) is expected


def test_micro_batches_have_the_rows_that_are_asked_for() -> None:
    sizes = [memory_growth.micro_batch(np.random.default_rng(seed), 900).num_tokens for seed in range(5)]
    assert all(900 <= size < 900 + 600 + 4 * 11 for size in sizes)
    assert len(set(sizes)) == 5


@pytest.mark.slow
def test_a_run_is_measured_from_end_to_end(tmp_path: Path) -> None:
    row = memory_growth.measure("float32", 3, returns=True)
    assert [step["rows"] > 0 and step["bytes"] > 0 for step in row["steps"]] == [True] * 3
    result = results.facts("python -m benchmarks.memory_growth", rows=[row])
    assert "levelled off" in memory_growth.report(result, markdown=True)
    memory_growth.draw(result, tmp_path / "memory.svg")
    assert "<svg" in (tmp_path / "memory.svg").read_text(encoding="utf-8")
