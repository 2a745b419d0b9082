"""The blocks of the reference pass: every example once, and at any world size micro-batches of every rank that are full."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec_dist.config.schema import RunConfig
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.runtime.world import World
from rec_dist.training.loader import StepWork, divide
from rec_dist.training.reference import _distinct_examples, full_blocks

MAX_TOKENS = 256


@pytest.mark.parametrize("size", [1, 2, 7])
def test_every_rank_has_full_micro_batches(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path, size: int) -> None:
    changes = ("task.kind=sdpo", "negatives.refresh_each_epoch=true", "train.epochs=4", "train.global_batch_size=4")
    config = RunConfig.model_validate(tiny_config(tmp_path, *changes, {"train.max_steps": None}))
    task = build_task(config, find_initial_weights(config), "cpu")
    assert task.reference is not None
    examples, epochs = _distinct_examples(task, task.reference)
    blocks = full_blocks(task, examples, epochs, max_tokens=MAX_TOKENS, world=World(0, size))
    assert np.array_equal(np.concatenate([np.arange(block.start, block.stop) for block in blocks]), np.arange(len(examples)))
    keys, fills = [], []
    for block in blocks:
        built = task.data.draw(examples[block], epochs[block])
        plans = [divide(task, built, step=0, epoch=0, max_tokens=MAX_TOKENS, world=World(rank, size)) for rank in range(size)]
        keys += [key for plan in plans for batch in plan.batches if batch.num_groups for key in batch.keys.tolist()]
        fills.append(fill(plans))
    assert len(blocks) > 1 and len(keys) == len(set(keys)) == len(examples)
    assert min(fills[:-1]) > 0.8, fills


def fill(plans: list[StepWork]) -> float:
    """The share of all ranks' micro-batches that holds tokens."""
    (count,) = {len(plan.batches) for plan in plans}
    return plans[0].num_tokens / (count * len(plans) * MAX_TOKENS)
