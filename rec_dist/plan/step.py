"""Seconds of a step and of a run. Pure formulas of plain numbers; docs/planning.md derives them and says what is assumed.

A micro-batch is a forward and a backward pass of every worker. What is not counted: the optimizer's step, checkpoints, waiting for data.
"""

from dataclasses import dataclass
from math import inf

from rec_dist.models.size import WeightCount
from rec_dist.plan.hardware import Hardware, ring_seconds
from rec_dist.plan.memory import Setup, gathered_sizes, kept_elements
from rec_dist.plan.workload import MicroBatches, Workload
from rec_dist.training.flops import recomputed_flops, step_flops

_BLOCK = 128  # columns that FlexAttention visits at least partly in vain, in each row


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: each part alone, and the whole when `overlap` of the gathers hides behind compute."""

    compute: float
    gather: float
    reduce: float
    hidden: float
    reference: float  # of one pass without a graph over the same micro-batches, not in `seconds` unless the reference is online
    seconds: float
    flops: float  # of the busiest worker, each operation once
    useful_flops: float  # of all workers, on tokens, as a run counts its mfu (training/flops.py): without padding and attention

    @property
    def exposed(self) -> float:
        """Seconds of communication that nothing hides."""
        return self.gather + self.reduce - self.hidden


def attention_flops(setup: Setup, micro_batches: MicroBatches, workload: Workload) -> float:
    """Forward, of the busiest worker: 4 q a pair of rows and layer (scores, and the sum of values), q = heads * head width.

    Pairs: all T * T with a dense mask; else those that see each other, and about one block of 128 columns a row.
    """
    if setup.attention != "sdpa":
        pairs = micro_batches.count * micro_batches.num_prompts * (workload.pairs + _BLOCK * workload.rows)
    else:
        pairs = micro_batches.count * micro_batches.rows**2
    return 4.0 * setup.shape.heads * setup.shape.head_dim * pairs * setup.shape.layers


def compute_flops(setup: Setup, work: WeightCount, micro_batches: MicroBatches, workload: Workload) -> tuple[float, float, float]:
    """(each operation once, with what is computed twice, forward alone) of a step's micro-batches on the busiest worker."""
    tokens, rows = (
        round(micro_batches.count * micro_batches.rows),
        round(micro_batches.count * micro_batches.num_prompts * workload.scored),
    )
    count = {"frozen": work.frozen, "training": work.training, "head": work.head}
    scores = attention_flops(setup, micro_batches, workload)
    once = step_flops(tokens, rows, **count, head_trains=work.head_trains) + 3 * scores
    twice = recomputed_flops(tokens, rows, **count, checkpointing=setup.checkpointing) + (scores if setup.checkpointing else 0)
    forward = 2 * tokens * (work.frozen + work.training) + 2 * rows * work.head + scores
    return once, once + twice, forward


def num_collectives(sizes: list[int], bucket: int) -> int:
    """Calls in which neighbours of `sizes` elements are gathered, up to `bucket` at once."""
    calls, filled = 0, inf
    for size in sizes:
        if filled + size > bucket:
            calls, filled = calls + 1, 0
        filled += size
    return calls


def gather_seconds(setup: Setup, hardware: Hardware) -> tuple[float, float]:
    """(of a micro-batch's forward pass, of its backward pass): ZeRO-3 gathers all in the first, and what was not kept in the second."""
    zero = setup.zero
    sizes = gathered_sizes(setup.parameters, zero)
    tied = setup.parameters.tied and setup.parameters.head > zero.persistence
    total = sum(sizes)
    kept = kept_elements(sizes, zero, tied=tied)
    calls = num_collectives(sizes, zero.prefetch)
    forward = ring_seconds(total * setup.element, hardware, collectives=calls)
    again = max(total - kept, 0)
    share = again / total if total else 0.0
    return forward, ring_seconds(again * setup.element, hardware, collectives=round(calls * share))


def reduce_seconds(setup: Setup, hardware: Hardware, micro_batches: int) -> float:
    """Of a step's gradients, in the run's dtype: scattered after each micro-batch from stage 2 on, once a step below; then whole weights
    again, except under stage 3."""
    zero, size = setup.zero, setup.parameters.trainable * setup.element
    calls = -(-setup.parameters.trainable // zero.bucket) if zero.bucket else 1
    once = ring_seconds(size, hardware, collectives=calls)
    return (micro_batches if zero.stage >= 2 else 1) * once + (once if zero.stage < 3 else 0.0)


def step_time(setup: Setup, hardware: Hardware, micro_batches: MicroBatches, workload: Workload, *, overlap: float) -> StepTime:
    """Of one step. overlap: share of the gathers that may hide behind compute; reductions never do (overlap_comm is off).

    On CPUs nothing hides: the cores that gather are those that compute.
    """
    work = setup.parameters.work
    assert work is not None, "experts are refused before"
    once, done, forward = compute_flops(setup, work, micro_batches, workload)
    first, second = gather_seconds(setup, hardware)
    compute, gather = done / hardware.flops, micro_batches.count * (first + second)
    overlap = overlap if setup.on_gpu else 0.0
    reduce = reduce_seconds(setup, hardware, micro_batches.count)
    hidden = min(overlap * gather, compute)
    alone = forward / hardware.flops
    reference = alone + micro_batches.count * first - min(overlap * micro_batches.count * first, alone)
    seconds = compute + gather + reduce - hidden + (reference if setup.reference == "online" else 0.0)
    tokens, scored = round(workload.num_prompts * workload.rows), round(workload.num_prompts * workload.scored)
    count = {"frozen": work.frozen, "training": work.training, "head": work.head}
    useful = step_flops(tokens, scored, **count, head_trains=work.head_trains)
    return StepTime(compute, gather, reduce, hidden, reference, seconds, once, useful)


def limit(time: StepTime, *, fits: bool, link: str) -> str:
    """What would have to grow for the run to be faster: memory, the named link, or compute."""
    if not fits:
        return "memory"
    if time.exposed > time.compute:
        return "network" if link == "network" else "links within the node"
    return "compute"
