"""cluster.zero_stage=auto: the smallest stage that fits, by setups worked out by hand and by the tiny model's configuration."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from rec_dist.config.schema import RunConfig
from rec_dist.engine.settings import EngineSettings, check_hpz, deepspeed_config
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.models.architecture import Architecture, Parameters
from rec_dist.models.size import WeightCount
from rec_dist.runtime.world import World
from rec_dist.sizing.device import smallest_share, total_bytes
from rec_dist.sizing.memory import Setup, Zero, layer_bytes
from rec_dist.sizing.settle import settled
from rec_dist.sizing.stage import SCORING, TRAINING, Purpose, Room, at_stage, scoring_bytes, smallest_stage, zero_of

SHAPE = Architecture(width=1024, inner=4096, layers=8, heads=16, kv_heads=4, head_dim=64, vocabulary=32000, max_positions=None)
HEAD = 32000 * 1024
PARAMETERS = Parameters(
    (HEAD, *(1 << 24,) * 8, HEAD),
    (True,) * 10,
    head=HEAD,
    tied=False,
    adapted=0,
    work=WeightCount(0, 8 << 24, HEAD, True),
    layers=(-1, *range(8), -1),
)
SETTINGS = EngineSettings(
    0, bf16=False, max_grad_norm=1.0, hidden_size=1024, max_live_parameters=20_000_000, workers=8, on_gpu=True
)
SETUP = Setup(SHAPE, PARAMETERS, zero_of(SETTINGS), 8, 4, 1024, attention="flex", checkpointing=True, rank=0, on_gpu=True)


def taken(
    room: float, purpose: Purpose = TRAINING, setup: Setup = SETUP, settings: EngineSettings = SETTINGS
) -> tuple[int, bool]:
    """(stage, whether it fits) on a device of `room` bytes."""
    choice = smallest_stage(setup, settings, purpose, Room(room, reserved=1e8, margin=0.1))
    return choice.stage, choice.fits


def needed(stage: int, purpose: Purpose = TRAINING, setup: Setup = SETUP) -> float:
    return purpose.needs(at_stage(setup, SETTINGS, stage), Room(0.0, reserved=1e8, margin=0.1))


def test_a_larger_stage_is_taken_only_where_the_smaller_does_not_fit() -> None:
    """200M weights train in float32. Eight workers share out moments from stage 1 on, gradients from 2 on, weights at 3."""
    needs = [needed(stage) for stage in range(4)]
    assert needs == sorted(needs, reverse=True)
    assert [taken(size) for size in needs] == [(stage, True) for stage in range(4)]
    assert [taken(size - 1) for size in needs[:3]] == [(1, True), (2, True), (3, True)]
    assert taken(needs[3] - 1) == (3, False)


def test_bfloat16_begins_where_gradients_are_summed_in_float32() -> None:
    settings = replace(SETTINGS, bf16=True)
    setup = replace(SETUP, element=2, zero=zero_of(settings))
    assert taken(1e12, setup=setup, settings=settings) == (2, True)
    choice = smallest_stage(setup, settings, TRAINING, Room(1e12, 0.0, 0.0))
    assert list(choice.needs) == [2, 3]
    alone = replace(settings, workers=1)
    assert list(smallest_stage(replace(setup, workers=1), alone, TRAINING, Room(1.0, 0.0, 0.0)).needs) == [2]


def test_one_worker_never_takes_stage_3() -> None:
    alone, settings = replace(SETUP, workers=1), replace(SETTINGS, workers=1)
    assert taken(1e12, setup=alone, settings=settings) == (0, True)
    assert taken(1.0, setup=alone, settings=settings) == (0, False)
    assert taken(1.0, SCORING, setup=alone, settings=settings) == (0, False)


def test_without_an_optimizer_only_the_weights_are_shared_out() -> None:
    whole, sharded = needed(0, SCORING), needed(3, SCORING)
    assert whole < needed(0) / 2
    assert (taken(whole, SCORING), taken(whole - 1, SCORING)) == ((0, True), (3, True))
    assert sharded < whole
    weights = PARAMETERS.total * 4
    activations = 1024 * 8 * 1024 + layer_bytes(SETUP)
    rest = 4 * 1024 * 32000 + 1024 * 1024 * 4 + 4 * HEAD + 1024 * 1024 * 6  # logits, hidden rows' and head's gradient, mask
    assert scoring_bytes(SETUP, reserved=0.0, margin=0.0) == pytest.approx(weights + activations + rest)


def test_on_a_cpu_freed_memory_is_kept_and_counted() -> None:
    on_cpu, settings = replace(SETUP, on_gpu=False, attention="per_prompt"), replace(SETTINGS, on_gpu=False)
    choice = smallest_stage(on_cpu, settings, TRAINING, Room(1e12, reserved=0.0, margin=0.1))
    bare = TRAINING.needs(at_stage(on_cpu, settings, 0), Room(1e12, reserved=0.0, margin=0.0))
    assert choice.needs[0] == pytest.approx(1.7 * bare)


def test_the_reason_says_what_was_counted() -> None:
    room = Room(needed(1), reserved=1e8, margin=0.1)
    why = smallest_stage(SETUP, SETTINGS, TRAINING, room).why
    assert why.startswith(f"the smallest that fits: it needs {needed(1) / 1e9:.1f} of a device's {needed(1) / 1e9:.1f} GB")
    assert f"stage 0 needs {needed(0) / 1e9:.1f} GB" in why and f"stage 3 needs {needed(3) / 1e9:.1f} GB" in why


def test_a_layer_is_gathered_as_a_whole() -> None:
    """Two parameters of a layer are one gather; what follows the kept layers is below the reuse distance."""
    from rec_dist.sizing.memory import gathered_sizes, kept_elements, live_elements

    parameters = replace(PARAMETERS, sizes=(40, 20, 10, 5, 25, 30), trains=(False,) * 6, layers=(-1, 0, 0, 1, 1, -1))
    zero = Zero(3, persistence=9, reuse=50, prefetch=7, layers=True)
    assert gathered_sizes(parameters, zero) == [40, 30, 25, 30]
    assert gathered_sizes(parameters, replace(zero, layers=False)) == [40, 20, 10, 25, 30]
    assert kept_elements([40, 30, 25, 30], zero, tied=False) == 55
    assert live_elements(parameters, zero) == 55 + 7 + 40


def config_of(tiny_config: Callable[..., dict[str, Any]], run_dir: Path, *changes: str) -> RunConfig:
    return RunConfig.model_validate(tiny_config(run_dir, "cluster.zero_stage=auto", *changes))


@pytest.mark.parametrize(("dtype", "stage"), [("float32", 0), ("bfloat16", 2)])
def test_one_worker_settles_alone(
    dtype: str, stage: int, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path
) -> None:
    config = config_of(tiny_config, tmp_path / "run", f"model.dtype={dtype}")
    model = build_task(config, InitialWeights(tiny_model_dir), "cpu").model
    assert model.spec is not None
    bf16 = model.dtype == torch.bfloat16
    settings, why = settled(config, model.spec, World(), TRAINING, width=model.width, bf16=bf16)
    assert (settings.zero_stage, settings.workers, settings.on_gpu) == (stage, 1, False)
    assert why is not None and why.startswith(f"stage {stage}, the only one")


def test_recommenders_take_stage_0(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = config_of(tiny_config, tmp_path / "run", "task.kind=sequential")
    model = build_task(config, InitialWeights(Path()), "cpu").model
    world = World(size=4)  # no process group is there, so what is shared out is this process's own
    settings, why = settled(config, model.spec, world, TRAINING, width=model.width, bf16=False)
    assert (settings.zero_stage, why) == (0, "stage 0, because the model is small")


def test_the_tiny_model_of_four_workers_fits_whole(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path
) -> None:
    config = config_of(tiny_config, tmp_path / "run")
    model = build_task(config, InitialWeights(tiny_model_dir), "cpu").model
    generator = torch.random.get_rng_state()
    settings, why = settled(config, model.spec, World(size=4), TRAINING, width=model.width, bf16=False)
    assert torch.equal(torch.random.get_rng_state(), generator)  # rank 0 alone counts, and must draw like the others
    assert settings.zero_stage == 0 and why is not None and "the smallest that fits" in why
    kept, why = settled(config, model.spec, World(size=4), TRAINING, width=model.width, bf16=False, before=3)
    assert kept.zero_stage == 3 and why is not None and "the newest checkpoint has; a new run would take stage 0" in why


def test_a_family_that_is_not_counted_takes_the_largest_stage(
    tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path
) -> None:
    config = config_of(tiny_config, tmp_path / "run")
    model = build_task(config, InitialWeights(tiny_model_dir), "cpu").model
    assert model.spec is not None
    (tmp_path / "config.json").write_text('{"model_type": "gpt2", "n_embd": 8, "vocab_size": 50}', encoding="utf-8")
    spec = replace(model.spec, path=tmp_path)
    settings, why = settled(config, spec, World(size=2), TRAINING, width=8, bf16=False)
    assert settings.zero_stage == 3 and why is not None and "not known" in why


def test_a_stage_that_is_given_is_taken(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]) -> None:
    config = config_of(tiny_config, tmp_path / "run", "cluster.zero_stage=3")
    settings, why = settled(config, None, World(), TRAINING, width=32, bf16=False)
    assert (settings.zero_stage, why) == (3, None)


def test_the_memory_of_a_host_is_shared_by_its_workers() -> None:
    assert 0 < smallest_share("cpu") == total_bytes("cpu")


def test_what_stage_3_configures_depends_on_device_and_ranks() -> None:
    def zero(**changes: Any) -> dict[str, Any]:
        value: dict[str, Any] = deepspeed_config(replace(SETTINGS, zero_stage=3, **changes))["zero_optimization"]
        return value

    assert zero()["overlap_comm"] is True and zero(on_gpu=False)["overlap_comm"] is False
    assert [zero(workers=workers)["stage3_allgather_sequential"] for workers in (8, 63, 64, 512)] == [False, False, True, True]
    assert zero(workers=512)["stage3_prefetch_bucket_size"] == 1  # as DeepSpeed sets it then
    assert zero(workers=512, hpz_partition_size=8)["stage3_allgather_sequential"] is False
    assert zero(hpz_partition_size=8)["zero_hpz_partition_size"] == 8


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (("cluster.zero_stage=auto",), ("cluster.hpz_partition_size (2)", "it is auto", "set cluster.zero_stage=3")),
        (("cluster.zero_stage=2",), ("cluster.hpz_partition_size (2)", "it is 2", "cluster.hpz_partition_size=1")),
        (("cluster.zero_stage=3",), ("cluster.hpz_partition_size (2)", "does not divide the 3 worker(s)", "or to 1")),
    ],
)
def test_hpz_without_effect_is_refused(
    changes: tuple[str, ...], words: tuple[str, ...], tmp_path: Path, tiny_config: Callable[..., dict[str, Any]]
) -> None:
    config = config_of(tiny_config, tmp_path / "run", "cluster.hpz_partition_size=2", *changes)
    with pytest.raises(UserError) as fault:
        check_hpz(config, workers=3)
    assert [word for word in words if word not in str(fault.value)] == []
    check_hpz(config_of(tiny_config, tmp_path / "run"), workers=3)
