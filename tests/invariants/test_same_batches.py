"""What step n trains on is a function of the data and the seed, not of shards, ranks, token budgets or stops.

Random data sets are written as real files; every rank's batches are built as training builds them.
"""

import itertools
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from prepared_rows import Row, write_prepared

from rec_dist.config.schema import PromptConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prompts.builder import PromptBuilder, build_prompt_builder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.preference import sdpo
from rec_dist.methods.task import Task
from rec_dist.models.assemble import ModelSpec
from rec_dist.runtime.world import World
from rec_dist.training.loader import prefetch, step_work

NUM_ITEMS, LONGEST = 30, 2000
TITLES = [f"{first} {second}" for first in ("Silent", "Golden", "Last", "Paper", "Winter") for second in "ABCDEF"]


@pytest.fixture(scope="module")
def builder(tiny_tokenizer: Any) -> PromptBuilder:
    return build_prompt_builder(PromptConfig(max_history=6, instruction="A user watched:"), tiny_tokenizer, TITLES)


@dataclass(frozen=True)
class Plan:
    """A random training set and the settings of a run over it."""

    lengths: list[int]
    per_prompt_targets: int
    examples_per_step: int
    epochs: int
    seed: int
    kind: Any
    refresh: bool
    window: int | None


PLANS = st.builds(
    Plan,
    st.lists(st.integers(2, 12), min_size=1, max_size=25),
    st.integers(1, 4),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 2**31),
    st.sampled_from(["uniform", "popularity", "low_rated"]),
    st.booleans(),
    st.none() | st.integers(1, 60),
)


def rows_of(plan: Plan) -> list[Row]:
    rng = np.random.default_rng(plan.seed)
    rows = []
    for user, length in enumerate(plan.lengths):
        items = rng.permutation(NUM_ITEMS)[: length + 2].tolist()
        rows.append(Row(user * 2, items[:length], int(rng.integers(1, length)), items[length:]))
    return rows


def make_task(plan: Plan, data: PreparedData, builder: PromptBuilder) -> Any:
    split = data.split("train")
    targets = index_targets(split, plan.per_prompt_targets)
    spec = ModelSpec(Path(), torch.float32, "cpu", "sdpa", False, None, None, keep_reference=False, seed=0)
    negatives = NegativeSampler(plan.kind, 3, plan.seed, data.train_counts)
    return language_task(
        sdpo(beta=1.0, num_negatives=3),
        spec,
        InteractionExamples(data, split, targets, builder, negatives, plan.refresh),
        sampler=GlobalBatchSampler(len(targets), plan.examples_per_step, plan.epochs, plan.seed, window=plan.window),
        reference_key="",
        width=8,
    )


def groups_of(task: Task, step: int, *, max_tokens: int, world_size: int) -> list[tuple[object, ...]]:
    """Every group of a step over all ranks, sorted: its key, its scored tokens, their lengths, and the rows that score them."""
    found, micro_batches = [], set()
    for rank in range(world_size):
        work = step_work(task, step, max_tokens=max_tokens, world=World(rank, world_size))
        micro_batches.add(len(work.batches))
        for batch in work.batches:
            if not batch.num_groups:
                continue
            assert len(batch.input_ids.reshape(-1)) <= max_tokens
            ends, groups = batch.completion_offsets.tolist(), batch.group_offsets.tolist()
            positions = batch.positions.reshape(-1)[batch.rows]
            for key, first, stop in zip(batch.keys.tolist(), groups, groups[1:], strict=False):
                own = slice(ends[first], ends[stop])
                lengths = np.diff(ends[first : stop + 1]).tolist()
                found.append((key, batch.targets[own].tolist(), lengths, positions[own].tolist()))
    assert len(micro_batches) == 1, "every rank runs the same number of micro-batches"
    return sorted(found)


def whole_batch(task: Task, **how: int) -> list[list[tuple[object, ...]]]:
    return [groups_of(task, step, **how) for step in range(task.sampler.num_steps)]


@settings(max_examples=20, deadline=None)
@given(
    plan=PLANS,
    attempts=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 7), st.integers(260, LONGEST)), min_size=1, max_size=3),
    stops=st.lists(st.floats(0, 1, allow_subnormal=False), max_size=3),
)
def test_each_global_step_is_the_same_however_a_run_is_cut_up(
    plan: Plan, attempts: list[tuple[int, int, int]], stops: list[float], builder: PromptBuilder
) -> None:
    with tempfile.TemporaryDirectory() as folder:
        rows = rows_of(plan)
        make = lambda name, shards: write_prepared(Path(folder) / name, {"train": rows}, TITLES, num_shards=shards)
        task = make_task(plan, make("whole", 1), builder)
        expected = whole_batch(task, max_tokens=LONGEST, world_size=1)
        assert sum(len(step) for step in expected) == task.data.split.num_targets * plan.epochs
        # Each stop is followed by an attempt with other shards, another number of ranks and another token budget.
        cuts = [0, *sorted(int(stop * len(expected)) for stop in stops), len(expected)]
        found: list[list[tuple[object, ...]]] = []
        for number, (start, stop) in enumerate(itertools.pairwise(cuts)):
            shards, world_size, tokens = attempts[number % len(attempts)]
            other = make_task(plan, make(f"attempt-{number}", shards), builder)
            steps = prefetch(
                lambda step, o=other, t=tokens, w=world_size: groups_of(o, step, max_tokens=t, world_size=w),
                range(start, stop),
            )
            found += list(steps)
        assert found == expected


@settings(max_examples=15, deadline=None)
@given(plan=PLANS, shards=st.integers(1, 9), seed=st.integers(0, 2**31))
def test_examples_of_any_shards_are_those_of_one(plan: Plan, shards: int, seed: int, builder: PromptBuilder) -> None:
    """Also one by one, and in any order of requests."""
    with tempfile.TemporaryDirectory() as folder:
        rows = {"train": rows_of(plan)}
        one, many = (
            make_task(plan, write_prepared(Path(folder) / str(n), rows, TITLES, num_shards=n), builder) for n in (1, shards + 1)
        )
        index = np.random.default_rng(seed).permutation(one.sampler.num_examples)[:20]
        epochs = np.arange(len(index)) % plan.epochs
        built = many.data.draw(index, epochs).build(range(len(index)))
        for example, number, epoch in zip(built, index.tolist(), epochs.tolist(), strict=True):
            alone = one.data.example(number, epoch)
            assert all(np.array_equal(getattr(example, name), value) for name, value in vars(alone).items())
        assert many.data.split.shards.num_open <= min(shards + 1, len(index))


@pytest.fixture
def train_data(tmp_path: Path) -> Iterator[Callable[[int], PreparedData]]:
    plan = Plan([8] * 40, 1, 4, 1, 0, "uniform", False, None)
    return lambda shards: write_prepared(tmp_path / f"shards-{shards}", {"train": rows_of(plan)}, TITLES, num_shards=shards)


def test_a_step_opens_the_shards_of_its_users_and_no_others(
    train_data: Callable[[int], PreparedData], builder: PromptBuilder
) -> None:
    plan = Plan([8] * 40, 1, 4, 1, 0, "uniform", False, None)
    data = train_data(10)
    task = make_task(plan, data, builder)
    assert task.data.split.shards.num_open == 0
    step_work(task, 3, max_tokens=LONGEST, world=World(1, 2))
    users = task.data.targets.rows[task.sampler.examples_of_step(3)[0]]
    assert task.data.split.shards.num_open == len(set((users // 4).tolist())) < 10
    # With a window, the first part of an epoch lies in few shards.
    windowed = make_task(replace(plan, window=16), data, builder)
    for step in range(4):
        step_work(windowed, step, max_tokens=LONGEST, world=World(0, 1))
    spread = make_task(plan, data, builder)
    for step in range(4):
        step_work(spread, step, max_tokens=LONGEST, world=World(0, 1))
    assert windowed.data.split.shards.num_open <= spread.data.split.shards.num_open
