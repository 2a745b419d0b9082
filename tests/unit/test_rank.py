"""Top-k lists against brute force: any scores, ties, exclusions, allow and deny lists, pools and lists of candidates."""

import tracemalloc
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.data.artifacts.recommendations import ItemColumns
from rec_dist.data.artifacts.user_blocks import TravellingUsers, batch_of, bytes_of, table_of_users, users_of_table
from rec_dist.data.sources.listings import Listing
from rec_dist.errors import NotFiniteError, UserError
from rec_dist.evaluation.baselines import Floats, PopularityScorer
from rec_dist.ranking.candidates import CandidateLists, GivenLists
from rec_dist.ranking.rank import Counts, Ranked, Wanted, rank_block, rank_users
from rec_dist.ranking.selection import best_of, best_of_pool
from rec_dist.ranking.users import UserBlock
from rec_dist.runtime.arrays import I32

NOTHING = np.empty(0, dtype=np.int32)
# Few values make ties; the infinite one is a probability of 0, and must not be taken for an item that is left out.
VALUES = st.sampled_from([-np.inf, -2.0, -1.5, 0.0, -0.0, 1.0, 1e300])


def i32(*values: int) -> I32:
    return np.asarray(values, dtype=np.int32)


def brute_force(items: Sequence[int], scores: Sequence[float], left_out: set[int], k: int) -> list[tuple[int, float]]:
    """All allowed pairs, sorted by score and then by id."""
    pairs = [(item, score) for item, score in zip(items, scores, strict=True) if item not in left_out]
    return sorted(pairs, key=lambda pair: (-pair[1], pair[0]))[:k]


@given(st.data())
@settings(max_examples=300, deadline=None)
def test_the_best_of_a_pool_are_those_of_brute_force(data: st.DataObject) -> None:
    pool = sorted(data.draw(st.sets(st.integers(0, 60), min_size=1, max_size=30)))
    k, num_rows = data.draw(st.integers(1, 35)), data.draw(st.integers(1, 4))
    scores = [data.draw(st.lists(VALUES, min_size=len(pool), max_size=len(pool))) for _ in range(num_rows)]
    places = [data.draw(st.sets(st.integers(0, len(pool) - 1))) for _ in range(num_rows)]
    left_out = [np.asarray(sorted(some), dtype=np.int64) for some in places]
    found = best_of_pool(np.asarray(scores), left_out, k)
    for row, best in enumerate(found):
        wanted = brute_force(pool, scores[row], {pool[place] for place in places[row]}, k)
        assert [(pool[place], scores[row][place]) for place in best.tolist()] == wanted


@given(st.dictionaries(st.integers(0, 60), VALUES, max_size=30), st.integers(1, 35), st.randoms())
@settings(max_examples=200, deadline=None)
def test_the_best_of_a_list_do_not_depend_on_its_order(scores: dict[int, float], k: int, random: object) -> None:
    items = list(scores)
    random.shuffle(items)  # type: ignore[attr-defined]
    values = [scores[item] for item in items]
    best = best_of(i32(*items), np.asarray(values, dtype=np.float64), k)
    assert [(items[place], values[place]) for place in best.tolist()] == brute_force(items, values, set(), k)


def test_a_score_that_is_no_number_ends_the_ranking() -> None:
    for size in (2, 5):
        scores = np.zeros((2, size))
        scores[1, 1] = np.nan
        with pytest.raises(NotFiniteError, match="NaN"):
            best_of_pool(scores, [NOTHING.astype(np.int64)] * 2, 2)
        with pytest.raises(NotFiniteError, match="NaN"):
            best_of(np.arange(size, dtype=np.int32), scores[1], 1)


class TableUsers:
    """Users u0, u1, ..., who have these histories in turn."""

    identity = "table"

    def __init__(self, histories: Sequence[I32], total: int | None = None) -> None:
        self._histories, self.total = histories, len(histories) if total is None else total

    def blocks(self, size: int, start: int = 0) -> Iterator[UserBlock]:
        for begin in range(start, self.total, size):
            numbers = range(begin, min(begin + size, self.total))
            yield UserBlock([f"u{n}" for n in numbers], [self._histories[n % len(self._histories)] for n in numbers])


class TableScorer:
    """Scores from a table (last item of the history, item). Counts the largest number of scores of a call."""

    def __init__(self, table: Floats) -> None:
        self._table, self.largest = table, 0

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        self.largest = max(self.largest, sum(len(items) for items in candidates))
        assert all(len(history) for history in histories), "an empty history has no last item"
        return [self._table[history[-1]][items] for history, items in zip(histories, candidates, strict=True)]


def lists_of(blocks: Iterator[Ranked]) -> dict[str, list[tuple[int, float, bool]]]:
    lists: dict[str, list[tuple[int, float, bool]]] = {}
    for block in blocks:
        columns = (block.user, block.rank, block.item, block.score, block.fallback)
        for user, rank, item, score, fallback in zip(*(column.tolist() for column in columns), strict=True):
            own = lists.setdefault(block.users[user], [])
            own.append((item, score, fallback))
            assert rank == len(own)
    return lists


@given(data=st.data())
@settings(max_examples=150, deadline=None)
def test_lists_equal_brute_force_in_any_block(data: st.DataObject, tmp_path_factory: pytest.TempPathFactory) -> None:
    num_items = data.draw(st.integers(1, 12))
    item = st.integers(0, num_items - 1)
    rows = st.lists(VALUES, min_size=num_items, max_size=num_items)
    table = np.asarray([data.draw(rows) for _ in range(num_items)])
    counts = np.asarray(data.draw(st.lists(st.integers(0, 3), min_size=num_items, max_size=num_items)))
    histories = data.draw(st.lists(st.lists(item, max_size=6), min_size=1, max_size=9))
    pool = sorted(data.draw(st.sets(item, min_size=1)))
    k, exclude_seen = data.draw(st.integers(1, 6)), data.draw(st.booleans())
    given_lists = data.draw(st.none() | st.lists(st.none() | st.lists(item, unique=True), min_size=9, max_size=9))
    lists = None
    if given_lists is not None and any(given_lists):
        rows_of = [Listing(n, f"u{n}", [str(i) for i in one]) for n, one in enumerate(given_lists) if one is not None]
        names = Numbers(num_items)
        lists = CandidateLists(tmp_path_factory.mktemp("lists") / "lists.sqlite", rows_of, names, None)  # type: ignore[arg-type]
    wanted = Wanted(i32(*pool), num_items, k, exclude_seen, lists)
    users = TableUsers([i32(*history) for history in histories])
    size = data.draw(st.integers(1, 4))
    found = lists_of(rank_users(users, TableScorer(table), PopularityScorer(counts), wanted, size=size))
    for number, history in enumerate(histories):
        own = range(num_items) if lists is None else given_lists[number]
        left_out = (set(range(num_items)) - set(pool)) | (set(history) if exclude_seen else set())
        scores = table[history[-1]] if history else counts.astype(np.float64)
        best = [] if own is None else brute_force(list(own), [scores[i] for i in own], left_out, k)
        assert found.get(f"u{number}", []) == [(one, score, not history) for one, score in best]


def test_a_block_that_travels_is_ranked_as_at_home(tmp_path: Path) -> None:
    """As a table there, and as bytes back: users with and without history and candidates, and any text as a name."""
    rng = np.random.default_rng(0)
    scorer, popularity = TableScorer(rng.random((9, 9))), PopularityScorer(np.arange(9, dtype=np.int64))
    histories = [i32(3, 1), NOTHING, i32(8), i32(0, 0, 5)]
    columns = ItemColumns([f"i{item}" for item in range(9)], [f"Film {item}" for item in range(9)])
    listings = [Listing(1, "u0", ["4", "3", "6"]), Listing(2, "u1", ["7"]), Listing(3, "u3", [])]
    lists = CandidateLists(tmp_path / "lists.sqlite", listings, Numbers(9), None)  # type: ignore[arg-type]
    for given_lists in (None, lists):
        wanted = Wanted(np.arange(9, dtype=np.int32), 9, 4, True, given_lists)
        (here,) = rank_users(TableUsers(histories), scorer, popularity, wanted, size=4)
        (block,) = TableUsers(histories).blocks(4)
        looked_up = [None] * 4 if given_lists is None else lists.of(block.users)
        there = users_of_table(table_of_users(TravellingUsers(7, 2, block.users, block.histories, looked_up)))
        assert (there.number, there.unknown) == (7, 2)
        found = rank_block(
            UserBlock(there.users, there.histories),
            None if given_lists is None else GivenLists(there.users, there.candidates),
            scorer,
            popularity,
            replace(wanted, candidates=None),
        )
        assert found.counts == here.counts
        batches = [
            columns.batch(one.users, one.user, one.rank, one.item, one.score, one.fallback, one.more) for one in (here, found)
        ]
        assert batch_of(bytes_of(batches[1])).equals(batches[0]) and batches[0].num_rows


class Numbers:
    """Items whose names are their numbers."""

    def __init__(self, num_items: int) -> None:
        self._num_items = num_items

    def find(self, names: Sequence[str]) -> tuple[I32, int]:
        known = [int(name) for name in names if int(name) < self._num_items]
        return i32(*known), len(names) - len(known)


def test_the_scores_of_a_block_are_bounded_at_any_size_of_catalogue() -> None:
    """32 MiB of scores: many users of a small catalogue, few of a large one, and never none."""
    for num_items in (1, 1000, 3500, 100_000, 1 << 23):
        size = Wanted(np.arange(num_items, dtype=np.int32), num_items, 10, True).block_size(0)
        assert size == 1 or size * num_items <= 1 << 22
        assert size * num_items >= 1 << 21 or size == 4096 or num_items > 1 << 21


def test_memory_does_not_grow_with_the_number_of_users() -> None:
    """16 times as many users take the same peak, while a matrix of users x items would take 16 times the memory."""
    num_items = 200
    rng = np.random.default_rng(0)
    table, wanted = rng.random((num_items, num_items)), Wanted(np.arange(num_items, dtype=np.int32), num_items, 5, True)
    histories = [*rng.integers(0, num_items, (64, 8)).astype(np.int32)]
    peaks = []
    for num_users in (2_000, 32_000):
        users = TableUsers(histories, num_users)
        tracemalloc.start()
        scorer, total = TableScorer(table), Counts()
        for block in rank_users(users, scorer, PopularityScorer(np.ones(num_items, dtype=np.int64)), wanted, size=500):
            total = total.plus(block.counts)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
        assert total.users == num_users and scorer.largest == 500 * num_items
    assert peaks[1] < 1.2 * peaks[0]
    assert peaks[1] < 32_000 * num_items * 8 / 4


def test_candidates_are_found_by_name_and_a_user_has_one_list(tmp_path: Path) -> None:
    rows = [Listing(2, "a", ["1", "0", "1", "9"]), Listing(3, "b", [])]
    lists = CandidateLists(tmp_path / "lists", rows, Numbers(5), None)  # type: ignore[arg-type]
    assert [None if one is None else one.tolist() for one in lists.of(["b", "c", "a"])] == [[], None, [1, 0]]
    assert (lists.users, lists.unknown, lists.shortest, lists.longest) == (2, 1, 0, 2)
    many = [Listing(n, f"u{n}", ["1"]) for n in range(1234)]
    lists = CandidateLists(tmp_path / "many", many, Numbers(5), None)  # type: ignore[arg-type]
    assert all(one is not None for one in lists.of([f"u{n}" for n in range(1234)]))
    with pytest.raises(UserError, match=r"c\.csv:7: user_id 'a' stands twice"):
        CandidateLists(tmp_path / "twice", [*rows, Listing(7, "a", [])], Numbers(5), tmp_path / "c.csv")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="names no item of the catalogue"):
        CandidateLists(tmp_path / "none", [Listing(1, "a", ["7"])], Numbers(5), tmp_path / "c.csv")  # type: ignore[arg-type]
