"""From the global plan to this rank's batches, built in a thread beside the step that runs.

Every rank builds every example of a step, since lengths decide the packing, and collates only its own: about 25 us a example.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from rec_dist.data.sampling.global_batches import assign_to_ranks, pack_evenly
from rec_dist.methods.task import Example, Task
from rec_dist.runtime.world import World


@dataclass(frozen=True)
class StepWork:
    """One global step as one rank sees it: its batches, which of the step's examples are in each, and the totals of all ranks."""

    step: int
    epoch: int
    batches: tuple[Any, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    num_groups: int
    num_scored: int
    num_tokens: int
    num_logical_tokens: int


def divide(task: Task, examples: Sequence[Example], *, step: int, epoch: int, max_tokens: int, world: World) -> StepWork:
    """Packs the examples of one global step, assigns the micro-batches to the ranks and collates this rank's. The same number on every rank."""
    lengths = np.asarray([example.num_tokens for example in examples], dtype=np.int64)
    ranks = assign_to_ranks(pack_evenly(lengths, max_tokens, world.size), lengths, world.size)
    return StepWork(
        step=step,
        epoch=epoch,
        batches=tuple(task.collate([examples[i] for i in micro_batch], step=step) for micro_batch in ranks[world.rank]),
        micro_batches=tuple(tuple(micro_batch) for micro_batch in ranks[world.rank]),
        num_groups=sum(example.num_groups for example in examples),
        num_scored=sum(example.num_scored for example in examples),
        num_tokens=int(lengths.sum()),
        num_logical_tokens=sum(example.num_logical_tokens for example in examples),
    )


def step_work(task: Task, step: int, *, max_tokens: int, world: World) -> StepWork:
    """Step `step` of the task's order, divided."""
    indices, epochs = task.sampler.examples_of_step(step)
    return divide(task, task.examples(indices, epochs), step=step, epoch=int(epochs[0]), max_tokens=max_tokens, world=world)


def with_beats(work: Iterable[StepWork], beat: Callable[[str, int], None]) -> Iterator[StepWork]:
    """The same, telling which step it is in and when it waits for the next one's data."""
    for plan in work:
        beat("step", plan.step + 1)
        yield plan
        beat("data", plan.step + 2)


def prefetch(make: Callable[[int], Any], indices: Sequence[int], *, depth: int = 2) -> Iterator[Any]:
    """make(i) for each index in order, at most `depth` ahead of the consumer, in one thread. An error is raised where it is met."""
    results: queue.Queue[tuple[Any, BaseException | None]] = queue.Queue(maxsize=depth)
    stopped = threading.Event()

    def put(value: tuple[Any, BaseException | None]) -> bool:
        while not stopped.is_set():
            try:
                results.put(value, timeout=0.2)
                return True
            except queue.Full:
                continue
        return False

    def produce() -> None:
        for index in indices:
            try:
                value: tuple[Any, BaseException | None] = (make(index), None)
            except BaseException as fault:  # handed to the consumer, which raises it
                put((None, fault))
                return
            if not put(value):
                return

    thread = threading.Thread(target=produce, name="prefetch", daemon=True)
    thread.start()
    try:
        for _ in indices:
            value, fault = results.get()
            if fault is not None:
                raise fault
            yield value
    finally:
        stopped.set()
        thread.join()
