"""files.json: what it finds, and what it takes."""

import json
from pathlib import Path

import pytest

from rec_dist.errors import UserError
from rec_dist.storage.checksums import CHECKSUMS_NAME, broken, verify_checksums, write_checksums


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "weights").write_bytes(bytes(range(200)))
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "below").mkdir()
    write_checksums(tmp_path)
    return tmp_path


def test_what_was_sealed_is_whole_and_later_files_are_nobodys_fault(folder: Path) -> None:
    assert set(json.loads((folder / CHECKSUMS_NAME).read_text())) == {"weights", "config.json"}
    (folder / "notes.txt").write_text("mine")
    assert broken(folder) == []
    verify_checksums(folder)


def test_every_byte_counts(folder: Path) -> None:
    whole = (folder / "weights").read_bytes()
    for place in range(len(whole)):
        (folder / "weights").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        assert broken(folder) == ["weights has changed since it was written (other hash)"]
    (folder / "weights").write_bytes(whole[:-1])
    (folder / "config.json").unlink()
    assert broken(folder) == ["config.json is missing", "weights has 199 bytes, not 200"]
    with pytest.raises(UserError, match=r"config.json is missing; remove finished.json of that run and train it again"):
        verify_checksums(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weights"', '{"weights": 3}', '{"weights": {"bytes": 1}}'])
def test_damaged_itself(folder: Path, text: str) -> None:
    (folder / CHECKSUMS_NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{CHECKSUMS_NAME}.*train it again"):
        broken(folder)


def test_a_folder_of_elsewhere_is_taken(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    assert broken(tmp_path) == []
    assert broken(tmp_path / "nowhere") == []
