"""Every target of a split stands in exactly one example, and an example never crosses users."""

from types import SimpleNamespace
from typing import Any

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from rec_dist.data.sampling.targets import index_targets


def split_of(lengths: list[int], first_target: list[int]) -> Any:
    """What index_targets reads of a split."""
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return SimpleNamespace(offsets=offsets, first_target=np.asarray(first_target, dtype=np.int32))


ROWS = st.lists(st.tuples(st.integers(1, 12), st.integers(0, 12)), max_size=8)


@given(ROWS, st.integers(1, 5))
def test_examples_cover_every_target_once_in_runs_of_neighbours(rows: list[tuple[int, int]], per_example: int) -> None:
    lengths, first = [length for length, _ in rows], [start for _, start in rows]
    index = index_targets(split_of(lengths, first), per_example)
    covered = [
        (row, position)
        for row, start, stop in zip(index.rows.tolist(), index.starts.tolist(), index.stops.tolist(), strict=True)
        for position in range(start, stop)
    ]
    # A first item has nothing before it, so it is never a target, whatever first_target says.
    expected = [(row, position) for row, length in enumerate(lengths) for position in range(max(first[row], 1), length)]
    assert covered == expected
    sizes = (index.stops - index.starts).tolist()
    assert all(1 <= size <= per_example for size in sizes)
    assert len(index) == sum(-(-max(length - max(start, 1), 0) // per_example) for length, start in rows)
