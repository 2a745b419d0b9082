"""Batches that processes build: the same as those of the thread, faults and ends included."""

import errno
import os
import pickle
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from prepared_rows import Row, write_prepared

from rec_dist.config.schema import PromptConfig
from rec_dist.data.prompts.builder import build_prompt_builder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.errors import DiskError, UnreachableError, UserError, WorkerFailedError
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.preference import sdpo
from rec_dist.methods.task import Task
from rec_dist.models.assemble import ModelSpec
from rec_dist.packing.transfer import packed_up, unpacked
from rec_dist.runtime.world import World
from rec_dist.training.loader import StepWork, steps_ahead

TITLES = [f"{first} {second}" for first in ("Silent", "Golden", "Last", "Paper") for second in "ABCDE"]


@pytest.fixture(scope="module")
def task(tiny_tokenizer: Any, tmp_path_factory: pytest.TempPathFactory) -> Task:
    rng = np.random.default_rng(0)
    users = [rng.permutation(len(TITLES))[:9].tolist() for _ in range(11)]
    rows = [Row(user, items[:7], 2, items[7:]) for user, items in enumerate(users)]
    data = write_prepared(tmp_path_factory.mktemp("data") / "data", {"train": rows}, TITLES, num_shards=1)
    builder = build_prompt_builder(PromptConfig(max_history=6, instruction="A user watched:"), tiny_tokenizer, TITLES)
    split = data.split("train")
    targets = index_targets(split, 1)
    examples = InteractionExamples(
        data, split, targets, builder, NegativeSampler("uniform", 3, 0, data.train_counts), refresh_negatives=True
    )
    spec = ModelSpec(Path(), torch.float32, "cpu", "sdpa", False, None, None, keep_reference=False, seed=0)
    sampler = GlobalBatchSampler(len(targets), 6, 2, 0, window=None)
    loss = sdpo(beta=1.0, num_negatives=3)
    return language_task(loss, spec, examples, sampler=sampler, reference_key="", width=8)


def made(task: Task, num_workers: int, rank: int = 0, **changes: Any) -> list[StepWork]:
    steps = range(task.sampler.num_steps)
    with steps_ahead(task, steps, max_tokens=200, world=World(rank, 2), num_workers=num_workers, **changes) as work:
        return list(work)


def assert_equal(found: Any, expected: Any) -> None:
    assert type(found) is type(expected)
    if isinstance(expected, torch.Tensor):
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected)
    elif hasattr(expected, "__dataclass_fields__"):
        for name in expected.__dataclass_fields__:
            assert_equal(getattr(found, name), getattr(expected, name))
    elif isinstance(expected, tuple | list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_equal(one, other)
    elif isinstance(expected, np.ndarray):
        np.testing.assert_array_equal(found, expected)
    else:
        assert found == expected


def test_any_number_of_processes_gives_the_steps_of_the_thread(task: Task) -> None:
    expected = made(task, 0)
    assert len({work.batches[0].input_ids.sum().item() for work in expected}) > 3  # steps differ
    drawn = torch.get_rng_state()
    for num_workers in (1, 2):
        assert_equal(made(task, num_workers), expected)
    assert torch.equal(torch.get_rng_state(), drawn)  # which dropout uses


def test_what_the_host_adds_to_a_batch_comes_along(task: Task) -> None:
    look_up = lambda batch: batch.with_reference(torch.arange(len(batch.completion_offsets) - 1, dtype=torch.float32))
    assert_equal(made(task, 1, look_up=look_up), made(task, 0, look_up=look_up))


def test_tensors_of_any_kind_come_through() -> None:
    numbers = torch.arange(12.0)
    batch = (
        *(numbers[3], numbers[:0], numbers[3:4].expand(1), torch.tensor(5).expand(1), torch.tensor([7]).as_strided((1,), (0,))),
        *(numbers.view(3, 4).T, numbers[2:9:3], numbers.to(torch.bfloat16), numbers > 3, numbers.new_zeros(0, 3), "a word"),
    )
    assert_equal(unpacked(pickle.loads(pickle.dumps(packed_up(batch)))), batch)


def test_our_errors_keep_their_line_and_another_fault_its_traceback(task: Task) -> None:
    def fail_with(fault: Exception) -> Any:
        def look_up(batch: Any) -> Any:
            raise fault

        return look_up

    for ours in (UserError("task.reference: not this"), DiskError("full"), UnreachableError("a store"), MemoryError("no room")):
        with pytest.raises(type(ours), match=f"^{ours}$"):
            made(task, 1, look_up=fail_with(ours))
    with pytest.raises(DiskError, match=r"^/shards: No space left .*; free space there"):
        made(task, 1, look_up=fail_with(OSError(errno.ENOSPC, "No space left on device", "/shards")))
    with pytest.raises(WorkerFailedError, match=r"in look_up\n(.|\n)*KeyError: 'lost'$"):
        made(task, 2, look_up=fail_with(KeyError("lost")))


def long_one(batch: Any) -> torch.Tensor:
    """In place of a batch, more bytes than a pipe holds: whoever sends them waits until they are read."""
    return torch.zeros(300_000)


@contextmanager
def processes_of(task: Task, num_workers: int) -> Iterator[tuple[Iterator[StepWork], list[psutil.Process]]]:
    """Long batches from processes that have begun, and those processes."""
    others = set(psutil.Process().children())
    steps = range(task.sampler.num_steps)
    with steps_ahead(task, steps, max_tokens=200, world=World(), num_workers=num_workers, look_up=long_one) as work:
        next(work)
        yield work, [process for process in psutil.Process().children() if process not in others]


def is_gone(process: psutil.Process) -> bool:
    return not process.is_running() or process.status() == psutil.STATUS_ZOMBIE


def gone(processes: list[psutil.Process], seconds: float = 20.0) -> bool:
    """Whether none of them is left after so long at most."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline and not all(map(is_gone, processes)):
        time.sleep(0.01)
    return all(map(is_gone, processes))


def test_a_process_that_is_killed_in_the_middle_of_a_batch_ends_the_step(task: Task) -> None:
    """Not the wait for the rest of that batch, which would have no end."""

    def lose_one() -> None:
        with processes_of(task, 2) as (work, own):
            assert len(own) == 2
            time.sleep(0.3)  # until both wait for the reader of what they have written in part
            own[0].kill()
            list(work)

    with pytest.raises(WorkerFailedError, match=r"^train\.dataloader_num_workers: .* SIGKILL;"):
        lose_one()


def test_signals_to_a_whole_job_are_for_the_worker(task: Task) -> None:
    with processes_of(task, 2) as (work, own):
        for process in own:
            process.send_signal(signal.SIGINT)
            process.send_signal(signal.SIGTERM)
        assert len(list(work)) == task.sampler.num_steps - 1


def test_processes_end_with_the_block_also_stopped_ones_and_where_an_error_is_kept(task: Task) -> None:
    try:
        with processes_of(task, 2) as (_, own):
            own[1].suspend()
            raise KeyError("of the step")
    except KeyError as fault:
        kept = fault  # as a notebook keeps the last one, with the frames of its traceback
    assert gone(own)
    assert kept.__traceback__ is not None


def test_processes_end_with_a_worker_that_is_killed(task: Task) -> None:
    """Else they hold its memory, ports and the lock of its run."""
    reader, writer = os.pipe()
    worker = os.fork()
    if not worker:
        try:
            with processes_of(task, 2) as (_, own):
                own[1].suspend()
                time.sleep(0.3)
                os.write(writer, " ".join(str(process.pid) for process in own).encode())
                time.sleep(60)
        finally:
            os._exit(1)
    own = [psutil.Process(int(pid)) for pid in os.read(reader, 100).split()]
    os.kill(worker, signal.SIGKILL)
    os.waitpid(worker, 0)
    try:
        assert len(own) == 2
        assert gone(own)
    finally:
        for process in own:
            if not is_gone(process):
                process.kill()


def test_python_exits_where_nobody_ended_the_processes() -> None:
    """As after a call from Python that has hung: its thread stays behind."""
    program = """
from rec_dist.training.loader_processes import LoaderProcesses
processes = LoaderProcesses(lambda step: bytes(10**6), range(9), 2)
assert processes.next() == bytes(10**6)
"""
    subprocess.run([sys.executable, "-c", program], check=True, timeout=100)
