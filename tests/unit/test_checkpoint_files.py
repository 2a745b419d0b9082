"""A checkpoint's folder: verify finds a change of any byte, and folders of other names are no checkpoints."""

import json
from pathlib import Path

import pytest

from rec_dist.checkpoint import files as checkpoint
from rec_dist.commands.verify import verify
from rec_dist.errors import UserError
from rec_dist.runtime.messages import messages_to
from rec_dist.storage.checksums import describe, write_manifest


def write(checkpoints: Path, step: int, loss: float | None = None) -> Path:
    """A committed checkpoint with two small files of a state."""
    final = checkpoint.folder_of(checkpoints, step)
    partial = final.with_name(final.name + ".tmp")
    partial.mkdir(parents=True)
    for name in ("state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"):
        (partial / name).write_bytes(f"{name} of step {step}".encode())
    manifest = checkpoint.Manifest(
        step=step,
        world_size=1,
        zero_stage=0,
        base="ab",
        config="cd",
        sampler={"seed": 0, "num_examples": 9, "step": step, "epoch": 0},
        valid_loss=loss,
        versions={"torch": None},
        files=[describe(path) for path in sorted(partial.iterdir())],
    )
    checkpoint.commit(partial, final, manifest)
    return final


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    for step, loss in ((3, 0.5), (6, 0.25)):
        write(tmp_path / "checkpoints", step, loss)
    return tmp_path


def test_a_flip_of_any_byte_is_found_and_named(run_dir):
    """Also in the manifest, where a flipped step would make the run resume from elsewhere."""
    verify(str(run_dir))
    folder = checkpoint.folder_of(run_dir / "checkpoints", 6)
    for path in sorted(folder.iterdir()):
        whole = path.read_bytes()
        for position in range(len(whole)):
            for mask in (1, 2, 16, 32):
                path.write_bytes(whole[:position] + bytes([whole[position] ^ mask]) + whole[position + 1 :])
                (problem,) = checkpoint.verify(folder)
                assert problem.startswith("step-00000006: "), (path.name, position, mask)
                assert path.name in problem, (path.name, position, mask)
        path.write_bytes(whole[:-1] if whole else b"x")
        with pytest.raises(UserError, match=r"1 fault: step-00000006: .*; a restart walks past what is damaged$"):
            verify(str(run_dir))
        path.write_bytes(whole)
    assert checkpoint.verify(folder) == []


def test_files_that_are_exchanged_added_or_removed_are_found(run_dir):
    folder = checkpoint.folder_of(run_dir / "checkpoints", 6)
    one, two = sorted(folder.glob("state-*"))
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    assert len(checkpoint.verify(folder)) == 2
    one.rename(folder / "aside")
    two.rename(one)
    (folder / "aside").rename(two)
    (folder / "state-00003-of-00002.safetensors").write_bytes(one.read_bytes())  # load would read it too
    assert checkpoint.verify(folder) == ["step-00000006: the manifest does not name state-00003-of-00002.safetensors"]
    (folder / "state-00003-of-00002.safetensors").unlink()
    two.unlink()
    assert checkpoint.verify(folder) == [f"step-00000006: {two.name} is missing"]


def test_a_checkpoint_under_the_name_of_another_step_is_found(run_dir):
    checkpoints = run_dir / "checkpoints"
    checkpoint.folder_of(checkpoints, 6).rename(checkpoint.folder_of(checkpoints, 9))
    (problem,) = checkpoint.verify(checkpoint.folder_of(checkpoints, 9))
    assert "belongs to step 6" in problem
    assert checkpoint.best(checkpoints).step == 3, "its validation loss is not believed either"


def test_a_validation_loss_that_was_changed_is_not_believed(run_dir):
    checkpoints = run_dir / "checkpoints"
    path = checkpoint.folder_of(checkpoints, 3) / "manifest.json"
    path.write_text(path.read_text().replace('"valid_loss": 0.5', '"valid_loss": 0.1'))
    assert checkpoint.best(checkpoints).step == 6


@pytest.mark.parametrize("name", ["step-9", "step-\u0669", "step-\u00b2", "step-00000009x", "step-0000000009", "step-"])
def test_folders_of_odd_names_are_no_checkpoints(name, run_dir):
    """A run would look for them under another name, or their names hold no number."""
    (run_dir / "checkpoints" / name).mkdir()
    assert checkpoint.committed(run_dir / "checkpoints") == [3, 6]
    with pytest.raises(UserError, match="no name of a checkpoint"):
        verify(str(run_dir))


@pytest.mark.parametrize("missing", ["checksum", "format_version", "base", "config", "sampler", "files", "valid_loss"])
def test_a_manifest_that_lacks_a_field_is_refused(missing, run_dir):
    folder = checkpoint.folder_of(run_dir / "checkpoints", 6)
    path = folder / "manifest.json"
    manifest = json.loads(path.read_text())
    del manifest[missing]
    if missing in ("checksum", "format_version"):
        path.write_text(json.dumps(manifest))
    else:
        version, _ = manifest.pop("format_version"), manifest.pop("checksum")
        write_manifest(path, version, manifest)
    (problem,) = checkpoint.verify(folder)
    assert problem.startswith("step-00000006: manifest.json ")
    assert checkpoint.best(run_dir / "checkpoints").step == 3


def test_verify_takes_one_checkpoint_and_says_what_it_takes(run_dir):
    said: list[str] = []
    folder = checkpoint.folder_of(run_dir / "checkpoints", 6)
    with messages_to(said.append):
        verify(str(folder))
    assert said == [f"{folder}: checkpoint whole"]
    (folder / "state-00001-of-00002.safetensors").write_bytes(b"")
    with pytest.raises(UserError, match="a restart walks past"):
        verify(str(folder))
    for wrong in (run_dir / "nothing", folder / "manifest.json", run_dir.parent):
        with pytest.raises(
            UserError, match=r"neither a prepared data set nor a run directory .*; give data.path, train.run_dir or the folder"
        ):
            verify(str(wrong))
