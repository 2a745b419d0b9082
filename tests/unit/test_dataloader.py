"""Batches that processes build: the same as those of the thread, faults and ends included."""

import multiprocessing
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
from rec_dist.errors import UserError
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.preference import sdpo
from rec_dist.methods.task import Task
from rec_dist.models.assemble import ModelSpec
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


def test_a_user_error_keeps_its_line_and_another_fault_its_traceback(task: Task) -> None:
    def reject(batch: Any) -> Any:
        raise UserError("task.reference: not this")

    def fail(batch: Any) -> Any:
        raise KeyError("lost")

    with pytest.raises(UserError, match=r"^task\.reference: not this$"):
        made(task, 1, look_up=reject)
    with pytest.raises(KeyError, match=r"in fail\n(.|\n)*lost"):
        made(task, 1, look_up=fail)


def test_processes_end_with_the_block_and_a_killed_one_is_told(task: Task) -> None:
    others = set(multiprocessing.active_children())  # such as those that a kept traceback of another test refers to
    steps = range(task.sampler.num_steps)
    with steps_ahead(task, steps, max_tokens=200, world=World(), num_workers=2) as work:
        next(work)
        own = set(multiprocessing.active_children()) - others
        assert len(own) == 2
    del work
    assert not any(process.is_alive() for process in own)

    def die(batch: Any) -> Any:
        psutil.Process().kill()

    with pytest.raises(RuntimeError, match=r"DataLoader worker .* exited unexpectedly|killed by signal"):
        made(task, 1, look_up=die)
