"""The seconds of a step. Pure formulas of plain numbers; docs/planning.md derives them and states their assumptions.

Each worker runs a forward and a backward pass for every micro-batch. The optimizer's step, checkpoints and waiting for data are
not counted.
"""

from dataclasses import dataclass, replace
from math import inf

from rec_dist.models.size import WeightCount
from rec_dist.plan.hardware import Hardware, ring_seconds
from rec_dist.plan.workload import MicroBatches, Workload
from rec_dist.sizing.memory import Setup
from rec_dist.sizing.shares import gathered_sizes, kept_elements
from rec_dist.training.flops import recomputed_flops, step_flops

_BLOCK = 128  # columns of each row that FlexAttention visits at least partly in vain

# Seconds of the host a decoder layer and micro-batch, (forward, backward): CPU time on one core of 32 Llama layers with LoRA on
# all linear layers and matrices too small to count (docs/planning.md). Never measured beside a GPU.
_LAUNCHES, _CHECKPOINTED_LAUNCHES = (0.039 / 32, 0.058 / 32), (0.062 / 32, 0.152 / 32)
_HOOKS = ((0.144 - 0.039) / 32, (0.121 - 0.058) / 32)  # more of it at stage 3, which gathers whole layers


@dataclass(frozen=True)
class StepTime:
    """Seconds of one step: each part by itself, and the whole if a share `overlap` of the gathers hides behind compute."""

    compute: float
    gather: float
    reduce: float
    hidden: float
    host: float  # that the device waits, because the host launches and gathers more slowly than the device computes
    reference: float  # one pass without a graph over the same micro-batches; part of `seconds` only if online
    seconds: float
    flops: float  # of the busiest worker, each operation counted once
    useful_flops: float  # of all workers, without padding and attention, as a run counts its mfu

    @property
    def exposed(self) -> float:
        """Seconds of communication that compute does not hide."""
        return self.gather + self.reduce - self.hidden


def attention_flops(setup: Setup, micro_batches: MicroBatches, workload: Workload) -> float:
    """Of a forward pass on the busiest worker: 4 q a pair of rows and layer (scores, and sums of values), q = heads * head width.

    With a dense mask all T * T pairs count; otherwise those that attend to each other, and about one block of 128 columns a row.
    """
    if setup.attention != "sdpa":
        pairs = micro_batches.count * micro_batches.num_prompts * (workload.pairs + _BLOCK * workload.rows)
    else:
        pairs = micro_batches.count * micro_batches.rows**2
    return 4.0 * setup.shape.heads * setup.shape.head_dim * pairs * setup.shape.layers


def compute_flops(setup: Setup, work: WeightCount, micro_batches: MicroBatches, workload: Workload) -> tuple[float, float, float]:
    """FLOPs of a step on the busiest worker: (each operation once, with recomputed ones twice, the forward passes alone)."""
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
    """Calls that gather neighbouring parameters of `sizes` elements, up to `bucket` elements at once."""
    calls, filled = 0, inf
    for size in sizes:
        if filled + size > bucket:
            calls, filled = calls + 1, 0
        filled += size
    return calls


def gather_seconds(setup: Setup, hardware: Hardware) -> tuple[float, float]:
    """Of a micro-batch: (forward, backward). ZeRO-3 gathers everything in the first, and what it did not keep in the second.

    With hpZ within the group that has a copy; what trains comes from all workers after each step, which is not counted.
    """
    zero = setup.zero
    if zero.hpz > 1:
        hardware = replace(hardware, workers=zero.hpz)
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
    """Of a step's gradients, in the run's dtype. They are scattered after each micro-batch from stage 2 on, below it once a step.

    Then the whole weights are gathered again, except under stage 3.
    """
    zero, size = setup.zero, setup.parameters.trainable * setup.element
    calls = -(-setup.parameters.trainable // zero.bucket) if zero.bucket else 1
    once = ring_seconds(size, hardware, collectives=calls)
    return (micro_batches if zero.stage >= 2 else 1) * once + (once if zero.stage < 3 else 0.0)


def host_seconds(setup: Setup) -> tuple[float, float]:
    """Of a micro-batch: (forward, backward), what the host does around the layers. On CPUs the rate of compute has the launches."""
    forward, backward = _CHECKPOINTED_LAUNCHES if setup.checkpointing else _LAUNCHES
    if not setup.on_gpu:
        forward = backward = 0.0
    if setup.zero.stage == 3:
        forward += _HOOKS[0]
        backward += _HOOKS[1] + (_HOOKS[0] if setup.checkpointing else 0.0)
    return setup.shape.layers * forward, setup.shape.layers * backward


def step_time(setup: Setup, hardware: Hardware, micro_batches: MicroBatches, workload: Workload, *, overlap: float) -> StepTime:
    """The time of one step. overlap: share of the gathers that can hide behind compute; reductions are not counted as hidden.

    A GPU works while the host runs ahead, so it waits for what the host takes longer. On CPUs nothing hides, because the same
    cores do everything.
    """
    work = setup.parameters.work
    assert work is not None, "sizing/stage.py rejects experts"
    once, done, forward = compute_flops(setup, work, micro_batches, workload)
    first, second = gather_seconds(setup, hardware)
    compute, gather = done / hardware.flops, micro_batches.count * (first + second)
    overlap = overlap if setup.on_gpu else 0.0
    reduce = reduce_seconds(setup, hardware, micro_batches.count)
    hidden = min(overlap * gather, compute)

    def waiting(host: float, busy: float) -> float:
        return max(micro_batches.count * host - busy, 0.0) if setup.on_gpu else micro_batches.count * host

    host = waiting(sum(host_seconds(setup)), compute + gather - hidden)
    alone, gathers = forward / hardware.flops, micro_batches.count * first
    reference = alone + gathers - min(overlap * gathers, alone)
    reference += waiting(host_seconds(setup)[0], reference)
    seconds = compute + gather + reduce - hidden + host + (reference if setup.reference == "online" else 0.0)
    tokens, scored = round(workload.num_prompts * workload.rows), round(workload.num_prompts * workload.scored)
    count = {"frozen": work.frozen, "training": work.training, "head": work.head}
    useful = step_flops(tokens, scored, **count, head_trains=work.head_trains)
    return StepTime(compute, gather, reduce, hidden, host, reference, seconds, once, useful)


def limit(time: StepTime, *, fits: bool, link: str) -> str:
    """What limits the run: memory, the host, the named link, or compute."""
    if not fits:
        return "memory"
    if time.host > time.exposed:
        return "the host, which launches and gathers more slowly than the device computes"
    if time.exposed > time.compute:
        return "network" if link == "network" else "links within the node"
    return "compute"
