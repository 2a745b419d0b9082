"""The random numbers are frozen: another value would silently change every order, negative and candidate of every run."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.runtime.rng import hash_u64, permute, uniform

HASHES = [
    0,
    258863698125685209,
    15979313559291895140,
    4815193057359064352,
    17824878756907967,
    2392573924989223431,
]
UNIFORMS = [0.2094333823026313, 0.958787747547837, 0.17385676186250343]
PERMUTATION = [2, 5, 6, 1, 7, 3, 0, 8, 4, 9]


def test_known_answers() -> None:
    assert [int(hash_u64(*keys)) for keys in ((), (0,), (1,), (-1,), (1, 2, 3), (3, 2, 1))] == HASHES
    assert uniform(7, np.arange(3)).tolist() == UNIFORMS
    assert permute(np.arange(10), 10, 1, 2).tolist() == PERMUTATION


@settings(max_examples=80, deadline=None)
@given(st.integers(1, 3000), st.integers(0, 2**40), st.integers(0, 100))
def test_permute_is_a_bijection(size: int, seed: int, epoch: int) -> None:
    assert sorted(permute(np.arange(size), size, seed, epoch).tolist()) == list(range(size))


@given(st.integers(2, 2**40), st.integers(0, 1000))
@settings(max_examples=50, deadline=None)
def test_permute_stays_in_range_without_a_list(size: int, seed: int) -> None:
    index = np.asarray([0, size // 2, size - 1], dtype=np.int64)
    found = permute(index, size, seed)
    assert ((found >= 0) & (found < size)).all()
    assert len(set(found.tolist())) == len(set(index.tolist()))


def test_a_part_of_a_permutation_is_that_part() -> None:
    whole = permute(np.arange(100), 100, 4, 2)
    assert permute(np.asarray([17, 3]), 100, 4, 2).tolist() == whole[[17, 3]].tolist()


def test_permutations_move_things_and_differ() -> None:
    firsts = np.stack([permute(np.arange(8), 8, seed) for seed in range(4000)])
    for place in (0, 3, 7):  # every item is equally often in every place: chi-square with 7 degrees of freedom
        counts = np.bincount(firsts[:, place], minlength=8)
        assert ((counts - 500.0) ** 2 / 500.0).sum() < 30


def test_arrays_broadcast_and_agree_with_scalars() -> None:
    users, positions = np.arange(4)[:, None], np.arange(3)[None, :]
    table = hash_u64(9, users, positions)
    assert table.shape == (4, 3)
    assert all(int(table[u, p]) == int(hash_u64(9, u, p)) for u in range(4) for p in range(3))
    assert len(np.unique(table)) == 12


def test_uniform_fills_the_unit_interval() -> None:
    values = uniform(1, np.arange(200_000))
    assert 0 <= values.min() < 1e-4
    assert 1 - 1e-4 < values.max() < 1
    counts, _ = np.histogram(values, bins=50, range=(0, 1))
    assert ((counts - 4000.0) ** 2 / 4000.0).sum() < 49 + 5 * np.sqrt(98)


@pytest.mark.parametrize("keys", [((0, 1), (1, 0)), ((0,), (0, 0)), ((5,), (-5,))])
def test_order_number_and_sign_of_keys_matter(keys: tuple[tuple[int, ...], tuple[int, ...]]) -> None:
    assert int(hash_u64(*keys[0])) != int(hash_u64(*keys[1]))
