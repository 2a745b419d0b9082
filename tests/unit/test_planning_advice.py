"""The advised settings fit by the formula that rejected the given ones, and are the largest that do."""

from dataclasses import replace
from typing import Any

import pytest

from rec_dist.models.known_decoders import Architecture, Parameters
from rec_dist.models.size import WeightCount
from rec_dist.plan.advice import combined_change, largest_micro_batch, single_changes, smallest_live
from rec_dist.sizing.memory import Setup, memory
from rec_dist.sizing.shares import Zero

SHAPE = Architecture(width=1024, inner=4096, layers=8, heads=16, kv_heads=4, head_dim=64, vocabulary=32000, max_positions=None)
LAYERS = (1 << 24,) * 8
PARAMETERS = Parameters(
    (32_768_000, *LAYERS, 32_768_000),
    (True,) * 10,
    head=32_768_000,
    tied=False,
    adapted=0,
    work=WeightCount(0, 8 << 24, 32_768_000, True),
)
STAGE_3 = Zero(3, persistence=1000, reuse=10**8, prefetch=10**7, bucket=10**7)
SMALLEST = 700


def setup(**changes: Any) -> Setup:
    base = Setup(SHAPE, PARAMETERS, Zero(2, bucket=10**7), 8, 2, 8192, attention="sdpa", checkpointing=False, rank=0, on_gpu=True)
    return replace(base, **changes)


def needs(value: Setup) -> float:
    return sum(memory(value, reserved=1e9, margin=0.08).values())


def sharded(value: Setup) -> Setup:
    return replace(value, zero=STAGE_3)


def test_the_largest_micro_batch_is_the_largest() -> None:
    room = 6e9
    tokens = largest_micro_batch(setup(), needs, room, smallest=SMALLEST)
    assert tokens is not None and tokens % 128 == 0 and tokens >= SMALLEST
    assert needs(setup(max_tokens=tokens)) <= room < needs(setup(max_tokens=tokens + 128))
    assert largest_micro_batch(setup(), needs, 1e9, smallest=SMALLEST) is None


@pytest.mark.parametrize("room", [3.5e9, 5e9, 8e9, 12e9, 16e9])
@pytest.mark.parametrize("start", [setup(), setup(attention="flex"), setup(zero=STAGE_3), setup(workers=1), setup(zero=Zero(0))])
def test_what_is_advised_fits(start: Setup, room: float) -> None:
    if needs(start) <= room:
        return
    changes = single_changes(start, sharded(start), needs, room, smallest=SMALLEST)
    for change in changes:
        assert len(change.keys) == 1
        assert needs(change.setup) == change.needs <= room
        assert change.setup.max_tokens >= SMALLEST
    both = combined_change(start, sharded(start), needs, room, smallest=SMALLEST)
    assert both is not None or not changes
    if both is not None:
        assert needs(both.setup) == both.needs <= room


def test_the_keys_are_what_changed() -> None:
    start = setup(max_tokens=16384, zero=Zero(0))
    both = combined_change(start, sharded(start), needs, 2.8e9, smallest=SMALLEST)
    assert both is not None
    assert both.keys["cluster.zero_stage"] == both.setup.zero.stage == 3
    assert both.keys["model.activation_checkpointing"] is both.setup.checkpointing is True
    assert both.keys["model.attention"] == "flex" and both.setup.flex
    assert both.keys.get("train.max_tokens_per_micro_batch", start.max_tokens) == both.setup.max_tokens
    assert both.keys.get("cluster.num_workers", start.workers) == both.setup.workers


def test_fewer_live_parameters_are_advised_where_they_make_it_fit() -> None:
    start = setup(zero=STAGE_3)
    live = smallest_live(start)
    assert live == 2 * PARAMETERS.head  # a module in use and one on its way
    bounded = replace(start, zero=start.zero.within(live))
    assert needs(bounded) < needs(start)
    changes = single_changes(start, start, needs, needs(bounded), smallest=SMALLEST)
    assert {"cluster.max_live_parameters": live} in [change.keys for change in changes]
    assert smallest_live(bounded) is None and smallest_live(replace(start, workers=1)) is None


def test_nothing_is_advised_where_nothing_helps() -> None:
    start = setup()
    assert single_changes(start, sharded(start), needs, 1e9, smallest=SMALLEST) == []
    assert combined_change(start, sharded(start), needs, 1e9, smallest=SMALLEST) is None
