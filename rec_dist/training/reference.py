"""Reference log-probs: looked up in a cache as a micro-batch is built, or scored just before its forward pass.

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

_MICRO_BATCHES = 8  # of each rank in a block of the reference pass; one more than the tokens fill costs an eighth then
_MEASURED = 256  # examples that tell how long they are
_FILL = 0.95  # of those micro-batches; a block of longer examples still fits


class ReferenceLogps(Protocol):
    """Gives a micro-batch what its loss compares with, in one of two places."""

    def look_up(self, batch: Any) -> Any:
        """Return the batch with what the host knows: called in the thread that builds it (training/loader.py)."""
        ...

    def attach(self, batch: Any) -> Any:
        """Return the batch with what has to be scored: called just before its forward pass. A collective then."""
        ...


class NoReference:
    """For tasks whose loss needs no reference."""

    def look_up(self, batch: Any) -> Any:
        """Return the batch as it is."""
        return batch

    def attach(self, batch: Any) -> Any:
        """Return the batch as it is."""
        return batch


@dataclass(frozen=True)
class CachedReference:
    """task.reference=cached."""

    store: ReferenceStore

    def look_up(self, batch: PackedBatch) -> PackedBatch:
        """Look the log-probs up by the keys of the batch's groups."""
        if not batch.num_groups:
            return batch
        return batch.with_reference(torch.from_numpy(self.store.lookup(batch.keys.numpy())))

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch as it is."""
        return batch


@dataclass(frozen=True)
class OnlineReference:
    """task.reference=online: scores with the adapter off, or with the frozen copy that the run started from."""

    engine: Engine
    device: str

    def look_up(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch as it is."""
        return batch

    def attach(self, batch: PackedBatch) -> PackedBatch:
        """Score the batch without a graph. It comes back on the device, so that its scores need not leave it."""
        batch = batch.to(self.device)
        self.engine.train_mode(False)
        with cast(Scorer, self.engine.module).as_reference():
            logps: torch.Tensor = self.engine.score(batch)[2]
        self.engine.train_mode(True)
        return batch.with_reference(logps)


def open_reference(engine: Engine, task: Task, context: WorkerContext, folder: Path) -> ReferenceLogps:
    """The reference of `task`. A cached one is read from `folder`, or computed with the engine as it stands. A collective."""
    if task.reference is None:
        return NoReference()
    if context.config.task.reference == "online":
        return OnlineReference(engine, context.world.device)

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
    blocks = full_blocks(task, examples, epochs, max_tokens=max_tokens, world=world)
    keys: list[I64] = []
    sizes: list[I64] = []
    logps: list[Any] = []
    tokens = 0

    def work(number: int) -> StepWork:
        drawn = task.data.draw(examples[blocks[number]], epochs[blocks[number]])
        return divide(task, drawn, step=number, epoch=0, max_tokens=max_tokens, world=world)

    for plan in prefetch(work, range(len(blocks))):
        scored: list[torch.Tensor] = []
        first, last = blocks[plan.step].start, blocks[plan.step].stop
        for number, batch in enumerate(plan.batches, start=1):
            scores = engine.score(batch)[2].float()
            if batch.num_groups:  # a dummy batch has nothing to keep
                keys.append(batch.keys.numpy().copy())  # the batch shares one buffer, which goes
                sizes.append(batch.group_offsets.diff().numpy())
                scored.append(scores)
            report(first + (last - first) * number // len(plan.batches), len(examples))
        if scored:
            logps.append(torch.cat(scored).cpu().numpy())  # once a block, since the host waits here
        tokens += plan.num_tokens
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


def full_blocks(task: Task, examples: I64, epochs: I64, *, max_tokens: int, world: World) -> list[slice]:
    """Cut the examples (u,) into blocks that fill about _MICRO_BATCHES micro-batches of every rank; the last may be short.

    The first examples tell how many tokens one has. They are in the order of the epochs, which is shuffled.
    """
    first = slice(0, _MEASURED)
    lengths = task.data.draw(examples[first], epochs[first]).sizes.num_tokens
    size = max(int(_FILL * _MICRO_BATCHES * world.size * max_tokens * len(lengths) / max(int(lengths.sum()), 1)), 1)
    return [slice(start, min(start + size, len(examples))) for start in range(0, len(examples), size)]


def _distinct_examples(task: Task, reference: Reference) -> tuple[I64, I64]:
    """(examples, epochs) that differ in what they draw, in the order of their first use."""
    pairs = [task.sampler.examples_of_step(step) for step in range(task.sampler.num_steps)]
    examples = np.concatenate([example for example, _ in pairs])
    epochs = np.concatenate([epoch for _, epoch in pairs])
    draws = np.asarray([reference.draw_epoch(int(epoch)) for epoch in epochs], dtype=np.int64)
    _, first = np.unique(np.stack([examples, draws]), axis=1, return_index=True)
    first = np.sort(first)
    return examples[first], epochs[first]
