"""A disk fault becomes one line with place, fault and remedy, whoever meets it. Any other exception stays as it is."""

import errno
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from s3_server import running
from safetensors.torch import save_file

from rec_dist.config.schema import DataConfig
from rec_dist.data.artifacts.reference_store import write_part
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import DiskError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import as_disk_error, describe, writing
from rec_dist.storage.files import write_json
from rec_dist.training.saving import cost_note, room_note


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """The system lets no file grow beyond num_bytes (EFBIG) inside the block."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_row_that_does_not_fit_leaves_no_half_row(tmp_path: Path) -> None:
    run = RunDirectory(tmp_path)
    run.append({"step": 1})
    size = run.metrics_path.stat().st_size
    with (
        largest_file(size + 10),
        pytest.raises(DiskError, match=r"metrics\.jsonl: File too large; .* run the same command again"),
    ):
        run.append({"step": 2, "loss": 0.123456789})
    assert run.metrics_path.stat().st_size == size
    run.append({"step": 3})
    assert [row["step"] for row in run.rows()] == [1, 3]


def test_whole_files_name_the_file_and_leave_nothing(tmp_path: Path) -> None:
    for write in (
        lambda: write_json(tmp_path / "a.json", {"text": "x" * 5000}),
        lambda: write_part(tmp_path, 0, np.arange(900), np.arange(901), np.zeros(900, dtype=np.float32)),
    ):
        with largest_file(2000), pytest.raises(OSError, match="File too large") as caught:
            write()
        assert as_disk_error(caught.value) is not None
        assert str(tmp_path) in str(as_disk_error(caught.value))
    assert list(tmp_path.iterdir()) == []


def test_the_fault_is_seen_through_safetensors_own_exception(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors"
    with largest_file(2000), pytest.raises(DiskError, match=r"model\.safetensors: File too large"), writing(path):
        save_file({"a": torch.zeros(4000)}, path)


def test_other_exceptions_are_no_faults_of_a_disk() -> None:
    for fault in (ValueError("no"), FileNotFoundError(errno.ENOENT, "gone"), OSError("without a number"), KeyError("a")):
        assert as_disk_error(fault) is None
        with pytest.raises(type(fault)), writing(Path("/x")):
            raise fault
    again = DiskError("said already")
    assert as_disk_error(again) is again


def test_a_full_disk_says_how_full(tmp_path: Path) -> None:
    line = describe(errno.ENOSPC, tmp_path / "a" / "b")
    assert line.startswith(f"{tmp_path}/a/b: No space left on device (")
    assert "GB free); free space there" in line
    assert "\n" not in line
    assert "checkpoint.keep" not in line, "a ranking, an export and a fitted run have no checkpoints"
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    for path in ("checkpoints", "checkpoints/step-3.tmp/state", "metrics.jsonl", "model/weights"):
        assert "or lower checkpoint.keep, then run" in describe(errno.ENOSPC, tmp_path / "run" / path), path


def test_a_slow_disk_is_named_when_it_costs_a_tenth() -> None:
    assert cost_note(0.9, 1.0) is None  # under a second
    assert cost_note(5.0, 51.0) is None
    note = cost_note(5.0, 49.0)
    assert note is not None
    assert "5.0 s" in note and "10%" in note and "checkpoint.every_steps" in note and "checkpoint.asynchronous=true" in note


def test_a_disk_without_room_is_named_before_it_is_full(tmp_path: Path) -> None:
    assert room_note(1000, 3, tmp_path) is None
    assert room_note(10**18, 0, tmp_path) is None  # all checkpoints that will be kept exist already
    note = room_note(10**18, 3, tmp_path)
    assert note is not None
    assert note.startswith("3 more checkpoint(s) of 1000000000.00 GB will not fit")
    assert "checkpoint.keep" in note


def test_a_source_that_does_not_fit_into_the_cache_names_its_key(tmp_path: Path) -> None:
    with running() as server:
        server.write("log.csv", b"user,item,timestamp\n" + b"a,x,1\n" * 1000)
        config = DataConfig(source=server.uri("log.csv"), path=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
        with (
            largest_file(2000),
            pytest.raises(DiskError, match=r"log\.csv: File too large; .*, or set data\.cache_dir to a folder"),
        ):
            prepare(config)
    assert list((tmp_path / "cache").iterdir()) == [] and not (tmp_path / "out").exists()
