"""Whom `rank` asks for: the longest row of each user of a data set, in any number of shards, from any user on."""

from pathlib import Path

import numpy as np
import pytest
from prepared_rows import Row, write_prepared

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.ranking.catalogue import ItemNames, item_pool
from rec_dist.ranking.users import ListedUsers, PreparedUsers, Users

TITLES = ["Heat", "Alien", "i0", "Amélie  ", "Big"]  # the title of item 2 reads like the id of item 0
ROWS = {
    "train": [Row(0, [1, 2]), Row(1, [3]), Row(3, [0, 1])],
    "valid": [Row(0, [1, 2, 3], 2), Row(2, [4, 0], 1)],
    "test": [Row(0, [1, 2, 3, 4], 3), Row(3, [0, 1, 2], 2), Row(4, [2, 1], 1)],
}
WHOLE = {"u0": [1, 2, 3, 4], "u1": [3], "u2": [4, 0], "u3": [0, 1, 2], "u4": [2, 1]}


@pytest.fixture(params=[1, 3])
def data(tmp_path: Path, request: pytest.FixtureRequest) -> PreparedData:
    return write_prepared(tmp_path / "data", ROWS, TITLES, num_shards=request.param)


def histories(users: Users, size: int, start: int = 0) -> dict[str, list[int]]:
    found: dict[str, list[int]] = {}
    for block in users.blocks(size, start):
        assert 0 < len(block.users) <= size
        found.update(zip(block.users, [history.tolist() for history in block.histories], strict=True))
    return found


@pytest.mark.parametrize("size", [1, 2, 100])
def test_users_of_a_data_set_have_all_their_items(data: PreparedData, size: int) -> None:
    users = PreparedUsers(data, None)
    assert users.total == 5
    assert list(histories(users, size).items()) == list(WHOLE.items())
    assert histories(users, size, 2) == {name: WHOLE[name] for name in ("u2", "u3", "u4")}
    assert histories(users, size, 5) == {}


def test_users_of_a_split_have_what_precedes_the_target(data: PreparedData) -> None:
    users = PreparedUsers(data, "test")
    assert histories(users, 2) == {"u0": [1, 2, 3], "u3": [0, 1], "u4": [2]}
    assert histories(PreparedUsers(data, "valid"), 9) == {"u0": [1, 2], "u2": [4]}
    assert len({PreparedUsers(data, split).identity for split in (None, "valid", "test")}) == 3


def test_a_split_without_users_is_the_users_mistake(tmp_path: Path) -> None:
    data = write_prepared(tmp_path / "data", {"train": [Row(0, [1, 2])]}, TITLES)
    with pytest.raises(UserError, match=r"--split \(test\) of .* has no user"):
        PreparedUsers(data, "test")
    assert histories(PreparedUsers(data, None), 3) == {"u0": [1, 2]}


def test_names_are_ids_before_titles(data: PreparedData) -> None:
    names = ItemNames(data)
    found, unknown = names.find(["i0", "Heat", "  Alien ", "i4", "alien", "", "i0 "])
    assert (found.tolist(), unknown) == ([0, 0, 1, 4, 0], 2)
    pool, notes = item_pool(names, ["i3", "Big", "Heat", "who"], ["i4"])
    assert pool.tolist() == [0, 3] and len(notes) == 1 and pool.dtype == np.int32
    assert item_pool(names, None, None)[0].tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(UserError, match="--deny leaves none"):
        item_pool(names, None, ["i0", "i1", "i2", "i3", "i4"])


def test_listed_users(data: PreparedData) -> None:
    names = ItemNames(data)
    users = ListedUsers({7: ("i1", "who"), "b": np.asarray(["Heat"])}, names)
    (block,) = users.blocks(10)
    assert (block.users, block.unknown) == (["7", "b"], 1)
    assert [history.tolist() for history in block.histories] == [[1], [0]]
    assert histories(ListedUsers([["i1"], [], ["i2"]], names), 2, 2) == {"2": [2]}
    assert users.identity != ListedUsers({7: ("i1",), "b": ["Heat"]}, names).identity
