"""Files are written whole or not at all, and fingerprints show changes."""

import json
import os
import stat
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rec_dist.commands.export import _made_whole
from rec_dist.errors import UserError
from rec_dist.storage.files import (
    atomic_path,
    beside,
    fingerprint,
    make_folder,
    put_in_place,
    readable,
    remove_left_over,
    sampled_fingerprint,
    sha256,
    write_json,
    write_text,
)


def test_an_exception_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail() -> None:
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise RuntimeError("killed")

    with pytest.raises(RuntimeError, match="killed"):
        fail()
    assert list(tmp_path.iterdir()) == []


def test_an_exception_keeps_the_older_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    write_json(path, {"step": 1})
    with pytest.raises(ValueError, match="JSON"):
        write_json(path, {"step": float("nan")})
    assert json.loads(path.read_text()) == {"step": 1}
    assert [entry.name for entry in tmp_path.iterdir()] == ["a.json"]


def test_the_file_appears_only_when_it_is_whole(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with atomic_path(path) as temporary:
        temporary.write_text("whole")
        assert not path.exists()
        assert temporary.parent == path.parent  # a rename is atomic within one file system only
    assert path.read_text() == "whole"


def test_writers_with_one_process_number_do_not_share_a_temporary_file(tmp_path: Path) -> None:
    """In containers every command is process 1; this process, as two writers, stands for two of them."""
    path = tmp_path / "a.txt"
    with atomic_path(path) as one:
        one.write_text("one")
        with atomic_path(path) as two:
            two.write_text("two")
        assert path.read_text() == "two"
    assert path.read_text() == "one"
    assert list(tmp_path.iterdir()) == [path]


def test_exports_with_one_process_number_do_not_share_a_folder(tmp_path: Path) -> None:
    out = tmp_path / "out"

    def export_twice() -> None:
        with _made_whole(out) as one:
            (one / "weights").write_text("one")
            with _made_whole(out) as two:
                (two / "weights").write_text("two")
            assert (one / "weights").read_text() == "one"

    with pytest.raises(UserError, match="exists"):
        export_twice()
    assert (out / "weights").read_text() == "two"
    assert list(tmp_path.iterdir()) == [out]


def test_others_may_read_what_the_umask_lets_them(tmp_path: Path) -> None:
    """safetensors creates files with mode 0600, but the umask of this process decides who may read them."""
    plain, saved = tmp_path / "plain", tmp_path / "model.safetensors"
    plain.touch()
    save_file({"x": np.zeros(1, dtype=np.float32)}, saved)
    (tmp_path / "folder").mkdir(mode=0o700)
    readable(tmp_path)
    assert saved.stat().st_mode & 0o777 == plain.stat().st_mode & 0o777
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o700
    with atomic_path(tmp_path / "vectors.safetensors") as temporary:
        save_file({"x": np.zeros(1, dtype=np.float32)}, temporary)
    assert (tmp_path / "vectors.safetensors").stat().st_mode & 0o777 == plain.stat().st_mode & 0o777


def test_text_is_utf8_on_every_machine(tmp_path: Path) -> None:
    write_text(tmp_path / "a", "Émigré 七")
    assert (tmp_path / "a").read_bytes() == "Émigré 七".encode()


def test_a_fingerprint_knows_values_and_not_the_order_of_keys() -> None:
    assert fingerprint({"a": 1, "b": {"c": 2, "d": 3}}) == fingerprint({"b": {"d": 3, "c": 2}, "a": 1})
    variants = [{"a": 1}, {"a": "1"}, {"a": 1.5}, {"a": None}, {"b": 1}, {"a": [1, 2]}, {"a": [2, 1]}, {}]
    assert len({fingerprint(value) for value in variants}) == len(variants)


def test_sha256_is_the_known_one(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"abc")
    assert sha256(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"


def test_a_sampled_fingerprint_distinguishes_folders(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    path.write_bytes(bytes(100_000))
    first = sampled_fingerprint(tmp_path, "*.safetensors")
    (tmp_path / "README.md").write_text("not matched")
    assert sampled_fingerprint(tmp_path, "*.safetensors") == first
    path.write_bytes(bytes(99_999) + b"\x01")
    assert sampled_fingerprint(tmp_path, "*.safetensors") != first
    path.write_bytes(bytes(100_001))
    assert sampled_fingerprint(tmp_path, "*.safetensors") != first
    path.write_bytes(bytes(100_000))
    path.rename(tmp_path / "other.safetensors")
    assert sampled_fingerprint(tmp_path, "*.safetensors") != first


def test_a_folder_takes_the_place_of_an_older_one_or_of_nothing(tmp_path: Path) -> None:
    for number in (1, 2):
        made = tmp_path / "made"
        (made / "below").mkdir(parents=True)
        (made / "below" / "file").write_text(str(number))
        put_in_place(made, tmp_path / "there")
        assert (tmp_path / "there" / "below" / "file").read_text() == str(number)
    assert [path.name for path in tmp_path.iterdir()] == ["there"]


def test_a_folder_that_cannot_be_placed_leaves_the_older_one(tmp_path: Path) -> None:
    made = tmp_path / "made"
    (made / "there").mkdir(parents=True)
    (made / "there" / "file").write_text("old")
    with pytest.raises(OSError, match="Invalid argument"):  # a folder cannot be moved into itself
        put_in_place(made, made / "there")
    assert (made / "there" / "file").read_text() == "old"
    assert [path.name for path in made.iterdir()] == ["there"]


def test_a_folder_is_not_replaced_unless_it_may_be(tmp_path: Path) -> None:
    for name in ("made", "there"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    with pytest.raises(OSError, match="not empty"):
        put_in_place(tmp_path / "made", tmp_path / "there", replace=False)
    assert (tmp_path / "there" / "file").read_text() == "there"
    with pytest.raises(IsADirectoryError):
        write_text(tmp_path / "there", "x")
    assert (tmp_path / "there" / "file").read_text() == "there"


def test_what_killed_writers_left_is_removed_and_nothing_else(tmp_path: Path) -> None:
    left = [beside(tmp_path / "model"), beside(tmp_path / "config.json")]
    left[0].mkdir()
    (left[0] / "file").write_text("x")
    left[1].write_text("x")
    kept = [".hidden.tmp", ".a.0123456.tmp", "a.01234567.tmp", ".a.01234567.lock", "model"]
    for name in kept:
        (tmp_path / name).write_text("x")
    remove_left_over(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(kept)


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_folder_lets_in_whom_it_should_whatever_the_umask_is(umask: int, tmp_path: Path) -> None:
    before = os.umask(umask)
    try:
        for access, mode in (("owner", 0o700), ("group", 0o750), ("everyone", 0o755)):
            made = tmp_path / access / "run"
            make_folder(made, access)  # type: ignore[arg-type]
            assert stat.S_IMODE(made.stat().st_mode) == mode
            assert stat.S_IMODE(made.parent.stat().st_mode) == 0o777 & ~umask
        (tmp_path / "own").mkdir(mode=0o750)
        own = stat.S_IMODE((tmp_path / "own").stat().st_mode)
        make_folder(tmp_path / "own", "owner")
        assert stat.S_IMODE((tmp_path / "own").stat().st_mode) == own, "a folder that was there keeps its mode"
    finally:
        os.umask(before)
