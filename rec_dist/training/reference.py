"""The cached reference: log-probs of every group this run will see, computed once by the policy as it starts.

At its first step the policy is the reference, so no second model and no adapter switch is needed. Cost: one forward pass a
group, once; later epochs with the same negatives, and every restart, read it back.
"""

import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch

from rec_dist.data.artifacts import reference_store
from rec_dist.data.artifacts.reference_store import ReferenceStore
from rec_dist.engine.engine import Engine
from rec_dist.methods.task import Task
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime import collectives
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.world import World
from rec_dist.training.loader import divide, prefetch

Report = Callable[[int, int], None]  # (done, total) examples


def cached_reference(
    engine: Engine, task: Task, folder: Path, key: str, *, max_tokens: int, world: World, report: Report
) -> tuple[ReferenceStore, dict[str, Any] | None]:
    """The store for `task`, read back when it is current, else computed with the engine as it stands. A collective.

    Returns the store, and {"seconds", "tokens", "groups"} when it was computed.
    """
    if collectives.share_from_main(world.is_main and reference_store.is_current(folder, key)):
        return reference_store.load(folder), None
    if world.is_main:
        reference_store.clear(folder)
    collectives.barrier()
    started = time.perf_counter()
    examples, epochs = _distinct_examples(task)
    block = max(task.sampler.examples_per_step, 64)
    keys: list[I64] = []
    sizes: list[I64] = []
    logps: list[Any] = []
    tokens = 0

    def work(number: int) -> Any:
        chosen = slice(number * block, (number + 1) * block)
        built = task.examples(examples[chosen], epochs[chosen])
        return divide(task, built, step=number, epoch=0, max_tokens=max_tokens, world=world)

    for plan in prefetch(work, range(-(-len(examples) // block))):
        for batch in plan.batches:
            scores = engine.score(batch)[2].float().cpu()
            if batch.num_groups:  # a dummy batch has nothing to keep
                keys.append(batch.keys.numpy())
                sizes.append(batch.group_offsets.diff().numpy())
                logps.append(scores.numpy())
        tokens += plan.num_tokens
        report(min((plan.step + 1) * block, len(examples)), len(examples))
    empty = np.empty(0, dtype=np.int64)
    offsets = np.concatenate([[0], np.cumsum(np.concatenate([*sizes, empty]))]).astype(np.int64)
    flat = np.concatenate([*logps, np.empty(0, dtype=np.float32)])
    reference_store.write_part(folder, world.rank, np.concatenate([*keys, empty]), offsets, flat)
    collectives.barrier()
    if world.is_main:
        reference_store.commit(folder, key, world.size)
    collectives.barrier()
    store = reference_store.load(folder)
    return store, {"seconds": time.perf_counter() - started, "tokens": tokens, "groups": len(store)}


def _distinct_examples(task: Task) -> tuple[I64, I64]:
    """(examples, epochs) that differ in what they draw, in the order of their first use."""
    pairs = [task.sampler.examples_of_step(step) for step in range(task.sampler.num_steps)]
    examples = np.concatenate([example for example, _ in pairs])
    epochs = np.concatenate([epoch for _, epoch in pairs])
    draws = np.asarray([task.draw_epoch(int(epoch)) for epoch in epochs], dtype=np.int64)
    _, first = np.unique(np.stack([examples, draws]), axis=1, return_index=True)
    first = np.sort(first)
    return examples[first], epochs[first]


def attach(store: ReferenceStore, batch: PackedBatch) -> PackedBatch:
    """The batch with its reference log-probs from the store."""
    if not batch.num_groups:
        return batch
    return batch.with_reference(torch.from_numpy(store.lookup(batch.keys.numpy())))
