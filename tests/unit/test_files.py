"""Files are written whole or not at all, and fingerprints show changes."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from rec_dist.commands.export import _made_whole
from rec_dist.errors import UserError
from rec_dist.storage.files import atomic_path, fingerprint, readable, sampled_fingerprint, sha256, write_json, write_text


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
