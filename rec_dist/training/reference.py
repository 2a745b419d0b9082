"""Reference log-probs: attached to each micro-batch just before its forward pass, from a cache or scored on the spot.

The cache holds the log-probs of every group that this run will see, computed once by the policy as the run starts. At
its first step the policy is the reference, so there is no second model and no adapter to switch. Cost: one forward pass
for each group, once; later epochs with the same negatives, and every restart, read the cache.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np
import torch

from rec_dist.data.artifacts import reference_store
from rec_dist.data.artifacts.reference_store import ReferenceStore
from rec_dist.engine.engine import Engine
from rec_dist.methods.task import Reference, Task
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist.runtime import collectives
from rec_dist.runtime.arrays import I64
from rec_dist.runtime.world import World
from rec_dist.training.context import WorkerContext
from rec_dist.training.loader import StepWork, divide, prefetch

Report = Callable[[int, int], None]  # (done, total) examples


class ReferenceLogps(Protocol):
    """Gives a micro-batch what its loss compares with."""

    def attach(self, batch: Any) -> Any:
        """Return the batch with its reference log-probs. A collective when they are scored on the spot."""
        ...


class NoReference:
    """For tasks whose loss needs no reference."""

    def attach(self, batch: Any) -> Any:
        """Return the batch as it is."""
        return batch


@dataclass(frozen=True)
class CachedReference:
    """task.reference=cached."""

    store: ReferenceStore

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Look the log-probs up by the keys of the batch's groups."""
        if not batch.num_groups:
            return batch
        return batch.with_reference(torch.from_numpy(self.store.lookup(batch.keys.numpy())))


@dataclass(frozen=True)
class OnlineReference:
    """task.reference=online: scores with the adapter off, or with the frozen copy that the run started from."""

    engine: Engine

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Score the batch without a graph."""
        self.engine.train_mode(False)
        with cast(Scorer, self.engine.module).as_reference():
            logps: torch.Tensor = self.engine.score(batch)[2]
        self.engine.train_mode(True)
        return batch.with_reference(logps.float().cpu())


def open_reference(engine: Engine, task: Task, context: WorkerContext, folder: Path) -> ReferenceLogps:
    """The reference of `task`. A cached one is read from `folder`, or computed with the engine as it stands. A collective."""
    if task.reference is None:
        return NoReference()
    if context.config.task.reference == "online":
        return OnlineReference(engine)

    def report(done: int, total: int) -> None:
        context.progress("reference", done, total)

    store, cost = cached_reference(
        engine, task, task.reference, folder, max_tokens=context.max_tokens, world=context.world, report=report
    )
    if cost is not None:
        context.record({"event": "reference", **cost})
        context.log(f"reference log-probs of {cost['groups']:,} groups cached in {cost['seconds']:.1f} s")
    return CachedReference(store)


def cached_reference(
    engine: Engine, task: Task, reference: Reference, folder: Path, *, max_tokens: int, world: World, report: Report
) -> tuple[ReferenceStore, dict[str, Any] | None]:
    """The store for `task`: read back when it is current, else computed with the engine as it stands. A collective.

    Returns the store, and {"seconds", "tokens", "groups"} when it was computed.
    """
    if collectives.share_from_main(world.is_main and reference_store.is_current(folder, reference.key)):
        return reference_store.load(folder), None
    if world.is_main:
        reference_store.clear(folder)
    collectives.barrier()
    started = time.perf_counter()
    examples, epochs = _distinct_examples(task, reference)
    block = max(task.sampler.examples_per_step, 64)
    keys: list[I64] = []
    sizes: list[I64] = []
    logps: list[Any] = []
    tokens = 0

    def work(number: int) -> StepWork:
        chosen = slice(number * block, (number + 1) * block)
        drawn = task.data.draw(examples[chosen], epochs[chosen])
        return divide(task, drawn, step=number, epoch=0, max_tokens=max_tokens, world=world)

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
        reference_store.commit(folder, reference.key, world.size)
    collectives.barrier()
    store = reference_store.load(folder)
    return store, {"seconds": time.perf_counter() - started, "tokens": tokens, "groups": len(store)}


def _distinct_examples(task: Task, reference: Reference) -> tuple[I64, I64]:
    """(examples, epochs) that differ in what they draw, in the order of their first use."""
    pairs = [task.sampler.examples_of_step(step) for step in range(task.sampler.num_steps)]
    examples = np.concatenate([example for example, _ in pairs])
    epochs = np.concatenate([epoch for _, epoch in pairs])
    draws = np.asarray([reference.draw_epoch(int(epoch)) for epoch in epochs], dtype=np.int64)
    _, first = np.unique(np.stack([examples, draws]), axis=1, return_index=True)
    first = np.sort(first)
    return examples[first], epochs[first]
