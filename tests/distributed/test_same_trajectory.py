"""World size, packing, ZeRO stage and recomputation do not change a run: losses and gradient norms are compared step by step."""

from typing import Any

import pytest
import torch

_SMALL_BATCHES = (
    "train.max_tokens_per_micro_batch=120"  # a group or two a micro-batch; by default here a micro-batch holds a whole step
)
_VARIANTS = {
    "two workers": (2, ()),
    "small micro-batches": (1, (_SMALL_BATCHES,)),
    "two workers, small micro-batches": (2, (_SMALL_BATCHES,)),
    "ZeRO-2, two workers": (2, ("cluster.zero_stage=2", _SMALL_BATCHES)),
    "ZeRO-3": (1, ("cluster.zero_stage=3",)),
    "ZeRO-3, two workers": (2, ("cluster.zero_stage=3",)),
    "batches from processes": (2, ("train.dataloader_num_workers=1", _SMALL_BATCHES)),
    "recomputation": (1, ("model.activation_checkpointing=true", _SMALL_BATCHES)),
    "everything": (2, ("cluster.zero_stage=3", "model.activation_checkpointing=true", _SMALL_BATCHES)),
}
_ALL, _SOME = tuple(_VARIANTS), ("two workers", "everything")
_METHODS = {
    "sft": (("task.kind=sft",), _ALL),
    "msl": (("task.kind=msl", "task.msl.temperature=2"), _SOME),
    "sdpo": (("task.kind=sdpo",), _ALL),
    "dmpo": (("task.kind=dmpo", "train.targets_per_prompt=2"), _SOME),
    "dpo": (("task.kind=dpo", "negatives.num=1"), _SOME),
    "mppo": (("task.kind=mppo",), _SOME),
    "dynamicpo": (("task.kind=dynamicpo", "negatives.num=5"), _SOME),
    "recpo": (("task.kind=recpo", "train.targets_per_prompt=2"), _SOME),
}

_LESS_OFTEN = ("dmpo", "dpo", "mppo", "dynamicpo", "recpo")  # S-DPO's loss with another pooling


def _is_slow(method: str, variant: str) -> bool:
    """S-DPO goes through every variant in `make test`, other methods through fewer."""
    return method in _LESS_OFTEN or (method == "sft" and variant not in _SOME)


def assert_same_run(run: Any, expected: Any) -> None:
    assert len(run.steps) == len(expected.steps) == 4
    for row, wanted in zip(run.steps, expected.steps, strict=True):
        # At step 1 the policy is the reference: rounding decides which of two equal rewards is larger.
        left_out = {"event"} | ({"rewards/accuracies"} if row["step"] == 1 else set())
        keys = wanted.keys() - left_out
        assert {key: row[key] for key in keys} == pytest.approx({key: wanted[key] for key in keys}, rel=1e-5, abs=1e-5)
        assert (row["loss"], row["grad_norm"]) == pytest.approx((wanted["loss"], wanted["grad_norm"]), rel=1e-5)
        assert (row["tokens"], row["logical_tokens"]) == (wanted["tokens"], wanted["logical_tokens"])
    assert run.weights.keys() == expected.weights.keys()
    for name, value in expected.weights.items():
        torch.testing.assert_close(run.weights[name], value, rtol=1e-5, atol=1e-5)
    assert max(float(value.abs().max()) for name, value in expected.weights.items() if "lora_B" in name) > 1e-3  # it trained


def works_of(trainer: Any, changes: tuple[str, ...], *, max_tokens: int, step: int = 0) -> list[Any]:
    """The work of each of two ranks in a step."""
    from rec_dist.config.schema import RunConfig
    from rec_dist.methods.registry import build_task, find_initial_weights
    from rec_dist.runtime.world import World
    from rec_dist.training.loader import step_work

    config = RunConfig.model_validate(trainer.config(trainer.new_dir(), *changes))
    task = build_task(config, find_initial_weights(config), "cpu")
    return [step_work(task, step, max_tokens=max_tokens, world=World(rank, 2)) for rank in (0, 1)]


@pytest.mark.parametrize(
    ("method", "variant"),
    [
        pytest.param(method, variant, marks=pytest.mark.slow if _is_slow(method, variant) else ())
        for method, (_, variants) in _METHODS.items()
        for variant in variants
    ],
)
def test_same_steps_and_weights(trainer: Any, method: str, variant: str) -> None:
    changes, _ = _METHODS[method]
    workers, more = _VARIANTS[variant]
    expected, run = trainer.once(*changes), trainer.once(*changes, *more, workers=workers)
    assert_same_run(run, expected)


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_of_one_group_leaves_a_rank_idle_and_is_the_same(trainer: Any, stage: int) -> None:
    changes = ("task.kind=sdpo", "train.global_batch_size=1")
    counts = [[batch.num_groups for batch in work.batches] for work in works_of(trainer, changes, max_tokens=2048)]
    assert sorted(counts) == [[0], [1]]
    assert_same_run(trainer.once(*changes, f"cluster.zero_stage={stage}", workers=2), trainer.once(*changes))


@pytest.mark.parametrize("method", _METHODS)
def test_a_micro_batch_is_split_before_a_rank_waits(trainer: Any, method: str) -> None:
    for step in range(4):
        large = works_of(trainer, _METHODS[method][0], max_tokens=2048, step=step)
        shared = [work.batches[0].num_groups for work in large]
        assert [len(work.batches) for work in large] == [1, 1]
        assert min(shared) > 0
        assert sum(shared) == large[0].num_groups
        small = works_of(trainer, _METHODS[method][0], max_tokens=120, step=step)
        counts = [[batch.num_groups for batch in work.batches] for work in small]
        assert len(counts[0]) == len(counts[1]) > 1
        assert sum(counts[0]) + sum(counts[1]) == large[0].num_groups
