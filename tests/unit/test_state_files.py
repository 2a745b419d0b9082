"""The files of a state: safetensors reads them back, their sizes are bounded, and asynchronous writing changes nothing."""

import hashlib
import resource
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file

from rec_dist.checkpoint.state_files import Entry, StateWriter, in_turn, lay_out

SHAPES = st.lists(st.lists(st.integers(1, 5), max_size=3).map(tuple), min_size=1, max_size=30)


def tensors_of(entries: list[Entry]) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return {entry.name: torch.randn(entry.shape, generator=generator) for entry in entries}


@given(SHAPES, st.integers(4, 400), st.integers(1, 5))
def test_every_tensor_stands_in_one_file_and_every_rank_is_served_in_its_order(
    shapes: list[tuple[int, ...]], max_bytes: int, world_size: int
) -> None:
    entries = [Entry(f"t{number}", shape) for number, shape in enumerate(shapes)]
    files = lay_out(entries, max_bytes)
    assert [entry for file in files for entry in file.entries] == entries
    assert len({file.name for file in files}) == len(files)
    for file in files:
        assert len(file.entries) == 1 or sum(entry.num_bytes for entry in file.entries) <= max_bytes
    turns = list(in_turn(files, world_size))
    for rank in range(world_size):
        own = [entry for file in files[rank::world_size] for entry in file.entries]
        assert [entry for owner, entry in turns if owner == rank] == own


def test_ranks_write_at_the_same_time() -> None:
    files = lay_out([Entry(f"t{number}", (10,)) for number in range(8)], 160)
    assert [file.name for file in files] == ["state-00001-of-00002.safetensors", "state-00002-of-00002.safetensors"]
    assert [owner for owner, _ in in_turn(files, 2)] == [0, 1] * 4
    assert [file.name for file in lay_out([Entry("t", (10,))], 160)] == ["state.safetensors"]


@pytest.mark.parametrize("asynchronous", [False, True])
def test_what_is_written_is_what_safetensors_reads_with_the_hash_it_has(tmp_path: Path, asynchronous: bool) -> None:
    entries = [Entry("step", ()), *(Entry(f"weight.{number}", (number, 7)) for number in range(1, 40))]
    tensors = tensors_of(entries)
    files = lay_out(entries, 3000)
    writer = StateWriter(tmp_path, files, asynchronous=asynchronous)
    for entry in entries:
        given_away = tensors[entry.name].clone()
        writer.put(given_away)
        if asynchronous:  # training continues and changes the tensor
            given_away.fill_(float("nan"))
    written = writer.finish()
    assert writer.done
    assert written.fault is None
    assert {entry.name for entry in written.files} == {file.name for file in files} == {path.name for path in tmp_path.iterdir()}
    for entry in written.files:
        data = (tmp_path / entry.name).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (entry.bytes, entry.sha256)
    read = {name: value for file in files for name, value in load_file(tmp_path / file.name).items()}
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[name], value) for name, value in tensors.items())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_a_fault_of_the_disk_is_raised_at_the_end_and_blocks_nobody(tmp_path: Path, asynchronous: bool) -> None:
    """A real limit of the system allows no file above 2 KB. 200 tensors are more than a bounded queue holds."""
    entries = [Entry(f"t{number}", (10, 10)) for number in range(200)]
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        writer = StateWriter(tmp_path, lay_out(entries, 10_000), asynchronous=asynchronous)
        for tensor in tensors_of(entries).values():
            writer.put(tensor)
        written = writer.finish()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert written.files == []
    assert written.fault is not None
    assert "File too large" in written.fault
    assert str(tmp_path) in written.fault


def test_a_fault_of_ours_is_raised_and_not_taken_for_the_disks(tmp_path: Path) -> None:
    writer = StateWriter(tmp_path, lay_out([Entry("t", (3,))], 100), asynchronous=False)
    writer.put(torch.zeros(4))
    with pytest.raises(AssertionError, match=r"t: \(4,\) in place of \(3,\)"):
        writer.finish()
