"""Reference log-probs on disk: reads return what was written, by key, and a damaged or foreign store is not used."""

from pathlib import Path

import numpy as np
import pytest

from rec_dist.data.artifacts import reference_store as store


def write(folder: Path, key: str = "abc") -> dict[int, list[float]]:
    """Writes two parts with ragged groups and unordered keys; returns key -> log-probs."""
    rng, expected = np.random.default_rng(0), {}
    for rank, keys in enumerate(([40, 7, 23], [8, 1])):
        sizes = rng.integers(1, 5, size=len(keys))
        offsets = np.concatenate([[0], np.cumsum(sizes)]).astype(np.int64)
        logps = rng.normal(size=offsets[-1]).astype(np.float32)
        store.write_part(folder, rank, np.asarray(keys, dtype=np.int64), offsets, logps)
        expected |= {k: logps[a:b].tolist() for k, a, b in zip(keys, offsets, offsets[1:], strict=False)}
    store.commit(folder, key, 2)
    return expected


def test_groups_come_back_in_the_order_asked_for(tmp_path: Path) -> None:
    expected = write(tmp_path)
    loaded = store.load(tmp_path)
    assert len(loaded) == 5
    for keys in ([1, 7, 8, 23, 40], [40, 1], [23, 23, 8], []):
        found = loaded.lookup(np.asarray(keys, dtype=np.int64))
        assert found.tolist() == [value for key in keys for value in expected[key]]


@pytest.mark.parametrize("key", [0, 9, 41])
def test_a_key_that_is_not_stored_is_never_answered(tmp_path: Path, key: int) -> None:
    write(tmp_path)
    with pytest.raises(AssertionError, match="no reference log-probs"):
        store.load(tmp_path).lookup(np.asarray([7, key], dtype=np.int64))


def test_a_store_belongs_to_its_key_and_to_its_bytes(tmp_path: Path) -> None:
    assert not store.is_current(tmp_path, "abc")
    write(tmp_path)
    assert store.is_current(tmp_path, "abc")
    assert not store.is_current(tmp_path, "abd")
    part = tmp_path / "part-00001.arrow"
    whole = part.read_bytes()
    for place in (len(whole) // 2, 0, len(whole) - 1):
        part.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert not store.is_current(tmp_path, "abc"), place
    part.write_bytes(whole[:-1])
    assert not store.is_current(tmp_path, "abc")
    part.unlink()
    assert not store.is_current(tmp_path, "abc")
    part.write_bytes(whole)
    assert store.is_current(tmp_path, "abc")


@pytest.mark.parametrize("text", ["", "{", '{"key": "abc"}', '{"format_version": 1, "key": "abc", "files": []}'])
def test_a_damaged_manifest_is_no_manifest(tmp_path: Path, text: str) -> None:
    write(tmp_path)
    (tmp_path / store.MANIFEST_NAME).write_text(text)
    assert not store.is_current(tmp_path, "abc")


def test_a_rank_without_groups_and_a_store_without_any(tmp_path: Path) -> None:
    nothing = np.empty(0, dtype=np.int64)
    store.write_part(tmp_path, 0, nothing, np.zeros(1, dtype=np.int64), np.empty(0, dtype=np.float32))
    store.commit(tmp_path, "k", 1)
    assert len(store.load(tmp_path)) == 0
    store.write_part(tmp_path, 1, np.asarray([3]), np.asarray([0, 2]), np.asarray([-1.0, -2.0], dtype=np.float32))
    store.commit(tmp_path, "k", 2)
    assert store.load(tmp_path).lookup(np.asarray([3])).tolist() == [-1.0, -2.0]


def test_clear_leaves_nothing_of_an_older_store(tmp_path: Path) -> None:
    write(tmp_path / "reference")
    store.clear(tmp_path / "reference")
    assert list((tmp_path / "reference").iterdir()) == []
    store.clear(tmp_path / "deep" / "new")
    assert (tmp_path / "deep" / "new").is_dir()
