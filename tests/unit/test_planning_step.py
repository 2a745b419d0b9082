"""Collectives, micro-batches and step times by numbers worked out by hand."""

from dataclasses import replace

import pytest
from random_prompts import Tree

from rec_dist.models.attention import visible
from rec_dist.models.known_decoders import Architecture, Parameters
from rec_dist.models.size import WeightCount
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.plan.hardware import Hardware, ring_seconds
from rec_dist.plan.step import gather_seconds, host_seconds, limit, num_collectives, reduce_seconds, step_time
from rec_dist.plan.workload import MicroBatches, Workload, pack
from rec_dist.sizing.memory import Setup
from rec_dist.sizing.shares import Zero

NODE = Hardware(
    memory=80e9,
    reserved=2e9,
    flops=1e12,
    device_rate=400e9,
    network_rate=200e9,
    device_latency=3e-6,
    network_latency=10e-6,
    per_node=8,
    workers=8,
)
SHAPE = Architecture(width=8, inner=16, layers=2, heads=2, kv_heads=1, head_dim=4, vocabulary=50, max_positions=None)
PARAMETERS = Parameters(
    (100, 60, 40), (False, False, True), head=100, tied=False, adapted=0, work=WeightCount(60, 40, 100, False)
)
SETUP = Setup(
    shape=SHAPE,
    parameters=PARAMETERS,
    zero=Zero(3, persistence=0, reuse=90, prefetch=100, bucket=30),
    workers=8,
    element=2,
    max_tokens=1024,
    attention="flex",
    checkpointing=False,
    rank=0,
    on_gpu=True,
)


def test_a_ring_within_a_node() -> None:
    """7/8 of 8 GB over 400 GB/s; two calls of 7 hops."""
    assert ring_seconds(8e9, NODE, collectives=2) == pytest.approx(0.0175 + 2 * 7 * 3e-6)
    assert ring_seconds(8e9, replace(NODE, workers=1)) == 0.0


def test_a_ring_over_nodes_goes_at_the_slower_link() -> None:
    """15/16 of 16 GB over 200 GB/s; 14 hops within the nodes and one between them."""
    two = replace(NODE, workers=16)
    assert two.nodes == 2
    assert two.link == (200e9, "network")
    assert ring_seconds(16e9, two) == pytest.approx(0.075 + 14 * 3e-6 + 10e-6)
    assert replace(two, network_rate=500e9).link == (400e9, "node")


def test_calls_fill_buckets() -> None:
    assert num_collectives([50, 60, 40, 200, 10], 100) == 4  # 50 | 60 40 | 200 | 10
    assert num_collectives([], 100) == 0


def test_gathers_of_a_micro_batch() -> None:
    """Forward gathers 100 + 60 + 40 elements. 60 + 40 of them stay (80 < 90 follow 60, and 200 follow 100): 100 backward."""
    forward, backward = gather_seconds(SETUP, NODE)
    assert forward == pytest.approx(7 / 8 * 400 / 400e9 + 2 * 7 * 3e-6)
    assert backward == pytest.approx(7 / 8 * 200 / 400e9 + 1 * 7 * 3e-6)
    assert gather_seconds(replace(SETUP, zero=Zero(2, bucket=30)), NODE) == (0.0, 0.0)
    over_nodes = replace(NODE, workers=16)
    within = gather_seconds(replace(SETUP, workers=16, zero=replace(SETUP.zero, hpz=8)), over_nodes)
    assert within == pytest.approx((forward, backward)) and within[0] < gather_seconds(SETUP, over_nodes)[0]


@pytest.mark.parametrize(("stage", "times"), [(0, 2), (1, 2), (2, 4), (3, 3)])
def test_reductions_of_a_step_of_three_micro_batches(stage: int, times: int) -> None:
    """80 bytes train: two buckets of 30 elements, a micro-batch or a step, and the weights gathered again below stage 3."""
    once = 7 / 8 * 80 / 400e9 + 2 * 7 * 3e-6
    assert reduce_seconds(replace(SETUP, zero=replace(SETUP.zero, stage=stage)), NODE, 3) == pytest.approx(times * once)


def test_rows_of_a_prompt_as_in_the_architecture_page() -> None:
    one = Workload(groups=32, targets=1, negatives=3, prompt=512, completion=10)
    assert (one.rows, one.scored) == (548, 37)
    assert replace(one, negatives=15).rows == 656
    assert replace(one, negatives=0).rows == 521


@pytest.mark.parametrize(("targets", "negatives"), [(1, 0), (1, 3), (4, 2)])
def test_a_workload_is_what_a_packed_batch_holds(targets: int, negatives: int) -> None:
    """P = 20, C = 5: a batch with these lengths, where every chosen title but the last one stands on the prompt."""
    prompt, completion = 20, 5
    grouped = list(range(prompt + (targets - 1) * completion))
    groups = []
    for target in range(targets):
        branch_point = prompt - 1 + target * completion
        chosen = grouped[branch_point + 1 : branch_point + completion] if target < targets - 1 else [200, 201, 202, 203]
        others = [[300 + 10 * (target * negatives + other) + token for token in range(completion)] for other in range(negatives)]
        groups.append((branch_point, [[*chosen, 999], *others]))
    batch = pack_prompts([Tree(grouped, groups).grouped_prompt()])
    work = Workload(groups=targets, targets=targets, negatives=negatives, prompt=prompt, completion=completion)
    assert work.rows == batch.num_tokens
    assert work.scored == len(set(batch.rows.tolist()))
    assert work.pairs == pytest.approx(int(visible(batch).sum()), rel=0 if targets == 1 else 0.02)


def test_micro_batches_of_a_step() -> None:
    """100 rows a prompt, 10 a micro-batch of 1,024. 176 prompts on 8 workers are 3 micro-batches each, of 8 prompts."""
    work = Workload(groups=176, targets=1, negatives=0, prompt=91, completion=10)
    assert work.rows == 100
    flex = pack(work, max_tokens=1024, workers=8, flex=True)
    assert (flex.count, flex.rows, flex.num_prompts) == (3, 1024.0, 8.0)
    assert flex.fill == pytest.approx(176 * 100 / (3 * 8 * 1024))
    assert pack(work, max_tokens=1024, workers=8, flex=False).rows == 800
    assert pack(work, max_tokens=64, workers=8, flex=False).count == 0


def test_the_prompts_of_a_group_share_a_micro_batch() -> None:
    """A group has two prompts of 100 rows, so a micro-batch of 1,024 takes 5 groups.

    64 groups on 8 workers are 2 micro-batches of 4 groups each.
    """
    work = Workload(groups=64, targets=1, negatives=0, prompt=91, completion=10, prompts_per_group=2)
    assert (work.num_prompts, work.example) == (128, 200)
    micro_batches = pack(work, max_tokens=1024, workers=8, flex=False)
    assert (micro_batches.count, micro_batches.rows, micro_batches.num_prompts) == (2, 800.0, 8.0)
    assert pack(work, max_tokens=128, workers=8, flex=False).count == 0


def test_a_step_by_hand() -> None:
    work = Workload(groups=8, targets=1, negatives=0, prompt=91, completion=10)
    micro_batches = MicroBatches(count=1, rows=1000.0, num_prompts=1.0, fill=1.0)
    hardware = replace(NODE, device_latency=0.0, network_latency=0.0)
    time = step_time(SETUP, hardware, micro_batches, work, overlap=0.5)
    pairs = work.pairs + 128 * 100
    once = 1000 * (4 * 60 + 6 * 40) + 10 * 4 * 100 + 3 * 4 * 8 * 2 * pairs
    assert time.flops == pytest.approx(once)
    assert time.compute == pytest.approx((once + 2 * 10 * 100) / 1e12)  # the head computes its logits twice
    assert time.gather == pytest.approx(7 / 8 * 600 / 400e9)
    assert time.hidden == pytest.approx(time.gather / 2)
    host = 2 * (144 + 121) * 1e-3 / 32  # of two layers, more than the device takes
    assert time.host == pytest.approx(host - time.compute - time.gather / 2)
    assert time.seconds == pytest.approx(time.compute + time.reduce + time.gather / 2 + time.host)
    online = step_time(replace(SETUP, reference="online"), hardware, micro_batches, work, overlap=0.5)
    assert online.seconds == pytest.approx(time.seconds + time.reference)
    assert step_time(replace(SETUP, reference="cached"), hardware, micro_batches, work, overlap=0.5) == time
    again = step_time(replace(SETUP, checkpointing=True), hardware, micro_batches, work, overlap=0.5)
    assert again.compute - time.compute == pytest.approx((2 * 1000 * 100 + 4 * 8 * 2 * pairs) / 1e12)


@pytest.mark.parametrize(
    ("stage", "checkpointing", "on_gpu", "milliseconds"),
    [
        (2, False, True, (39, 58)),
        (3, False, True, (144, 121)),
        (2, True, True, (62, 152)),
        (3, True, True, (62 + 105, 152 + 63 + 105)),
        (2, False, False, (0, 0)),
        (3, False, False, (105, 63)),
    ],
)
def test_what_the_host_does_around_32_layers(
    stage: int, checkpointing: bool, on_gpu: bool, milliseconds: tuple[int, int]
) -> None:
    zero = replace(SETUP.zero, stage=stage)
    setup = replace(SETUP, shape=replace(SHAPE, layers=32), zero=zero, checkpointing=checkpointing, on_gpu=on_gpu)
    assert host_seconds(setup) == pytest.approx(tuple(value / 1e3 for value in milliseconds))


def test_the_host_counts_where_the_device_waits_for_it() -> None:
    work = Workload(groups=8, targets=1, negatives=0, prompt=91, completion=10)
    micro_batches = MicroBatches(count=3, rows=1000.0, num_prompts=1.0, fill=1.0)
    busy = step_time(SETUP, replace(NODE, flops=1e8), micro_batches, work, overlap=0.5)
    assert busy.host == 0
    on_cpu = step_time(replace(SETUP, on_gpu=False), replace(NODE, flops=1e8), micro_batches, work, overlap=0.5)
    assert on_cpu.host == pytest.approx(3 * sum(host_seconds(replace(SETUP, on_gpu=False))))


def test_what_limits() -> None:
    work = Workload(groups=8, targets=1, negatives=0, prompt=91, completion=10)
    micro_batches = MicroBatches(count=1, rows=1000.0, num_prompts=1.0, fill=1.0)
    hosted = step_time(SETUP, replace(NODE, flops=1e18), micro_batches, work, overlap=0.5)
    fast = replace(hosted, host=0.0)
    slow = step_time(SETUP, replace(NODE, flops=1e8), micro_batches, work, overlap=0.5)
    assert limit(slow, fits=True, link="network") == "compute"
    assert limit(hosted, fits=True, link="network").startswith("the host")
    assert limit(fast, fits=True, link="network") == "network"
    assert limit(fast, fits=True, link="node") == "links within the node"
    assert limit(slow, fits=False, link="node") == "memory"
