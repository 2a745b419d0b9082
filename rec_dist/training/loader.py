"""From the global plan to this rank's batches, built beside the step that runs: in a thread, or in processes.

Every rank draws every example of a step, since their sizes decide the packing, and builds only its own. The step is a pure function
of its number, so processes change nothing but who computes it.
"""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from itertools import islice
from typing import Any, Literal

from rec_dist.data.sampling.global_batches import assign_to_ranks, pack_evenly
from rec_dist.methods.task import DrawnExamples, Task
from rec_dist.packing.transfer import packed_up, staged, unpacked
from rec_dist.runtime.world import World
from rec_dist.training.loader_processes import LoaderProcesses

Change = Callable[[Any], Any]  # of a batch


@dataclass(frozen=True)
class StepWork:
    """One global step as one rank sees it: its batches, which of the step's examples are in each, and the totals of all ranks.

    Token counts are of the whole global step: num_scored that losses are taken over, num_tokens rows of the model run,
    num_logical_tokens with every prompt written out before each of its completions.
    """

    step: int
    epoch: int
    batches: tuple[Any, ...]
    micro_batches: tuple[tuple[int, ...], ...]
    num_groups: int
    num_scored: int
    num_tokens: int
    num_logical_tokens: int

    def count(self, mean_over: Literal["groups", "tokens"]) -> int:
        """What the step's loss is a mean over, as methods.task.TaskModel.mean_over says."""
        return self.num_scored if mean_over == "tokens" else self.num_groups


def as_it_is(batch: Any) -> Any:
    """The batch, which lacks nothing."""
    return batch


def divide(
    task: Task, drawn: DrawnExamples, *, step: int, epoch: int, max_tokens: int, world: World, look_up: Change = as_it_is
) -> StepWork:
    """Pack the examples of one global step, assign the micro-batches to ranks, and build and collate this rank's.

    Every rank gets the same number of micro-batches. look_up: adds to each what the host knows of it
    (training/reference.py). Where the rank has a GPU, they are ready to be sent there.
    """
    sizes = drawn.sizes
    packed = pack_evenly(sizes.num_tokens, max_tokens, world.size)
    own = assign_to_ranks(packed, sizes.num_tokens, world.size)[world.rank]
    examples = iter(drawn.build([place for micro_batch in own for place in micro_batch]))
    collated = (task.data.collate(list(islice(examples, len(micro_batch))), step=step) for micro_batch in own)
    return StepWork(
        step=step,
        epoch=epoch,
        batches=tuple(staged(look_up(batch), world.device) for batch in collated),
        micro_batches=tuple(tuple(micro_batch) for micro_batch in own),
        num_groups=int(sizes.num_groups.sum()),
        num_scored=int(sizes.num_scored.sum()),
        num_tokens=int(sizes.num_tokens.sum()),
        num_logical_tokens=int(sizes.num_logical_tokens.sum()),
    )


def step_work(task: Task, step: int, *, max_tokens: int, world: World, look_up: Change = as_it_is) -> StepWork:
    """Step `step` of the task, divided."""
    indices, epochs = task.sampler.examples_of_step(step)
    drawn = task.data.draw(indices, epochs)
    return divide(task, drawn, step=step, epoch=int(epochs[0]), max_tokens=max_tokens, world=world, look_up=look_up)


def with_beats(work: Iterable[StepWork], beat: Callable[[str, int], None]) -> Iterator[StepWork]:
    """The same steps, with a sign of life when a step begins and when the loop waits for the next step's data."""
    for plan in work:
        beat("step", plan.step + 1)
        yield plan
        beat("data", plan.step + 2)


@contextmanager
def steps_ahead(
    task: Task, steps: Sequence[int], *, max_tokens: int, world: World, look_up: Change = as_it_is, num_workers: int = 0
) -> Iterator[Iterator[StepWork]]:
    """step_work of each of `steps` in order, made ahead of the consumer, until the block ends.

    num_workers: processes that make it, forked here (training/loader_processes.py says what they raise); the thread hands over what
    they make. 0: the thread makes it.
    """
    build = partial(step_work, task, max_tokens=max_tokens, look_up=look_up)
    host = replace(world, device="cpu")
    processes = LoaderProcesses(lambda step: packed_up(build(step, world=host)), steps, num_workers)

    def receive(_: int) -> StepWork:
        made: StepWork = processes.next()
        return replace(made, batches=tuple(staged(unpacked(batch), world.device) for batch in made.batches))

    work: Any = prefetch(receive if num_workers else partial(build, world=world), steps)
    try:
        yield work
    finally:
        processes.end()  # first: the thread may wait for one that is stopped
        work.close()


def prefetch(make: Callable[[int], Any], indices: Sequence[int], *, depth: int = 2) -> Iterator[Any]:
    """make(i) for each index in order, in one thread, at most `depth` ahead of the consumer, who also gets its errors."""
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
            except BaseException as fault:  # for the consumer to raise
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
