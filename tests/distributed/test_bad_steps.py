"""A step whose loss or gradient is not finite on one rank alone is skipped on all ranks and named; too many end the run."""

import json
import re
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from worker_processes import WorkerFailedError

_CHANGES = (
    "train.max_steps=6",
    "task.kind=sdpo",
    "train.global_batch_size=8",
    "train.max_tokens_per_micro_batch=120",
    "checkpoint.every_steps=1",
    "checkpoint.keep=10",
)


def bad_worker(world: Any, job: Any) -> Any:
    """train_worker in which the first micro-batch of rank 0 spoils some steps.

    The kinds are "loss", "gradient", and "loss alone" with a sound gradient.
    """
    from rec_dist.engine.engine import Engine
    from rec_dist.training import loop
    from rec_dist.training.worker import train_worker

    job, kind, bad = job
    forward_backward, forward, now = loop.TrainStep.forward_backward, Engine.forward, {"bad": False}

    def spoiling_step(step: Any, plan: Any) -> Any:
        now["bad"] = world.is_main and plan.step + 1 in bad
        return forward_backward(step, plan)

    def spoiling_forward(engine: Any, batch: Any) -> Any:
        loss, sums, logps = forward(engine, batch)
        if now["bad"]:
            now["bad"] = False
            if kind != "loss alone":
                loss.register_hook(lambda gradient: gradient * float("nan"))
            if kind != "gradient":
                sums = sums.clone()
                sums[0] = float("inf")
        return loss, sums, logps

    loop.TrainStep.forward_backward, Engine.forward = spoiling_step, spoiling_forward  # type: ignore[method-assign]
    return train_worker(world, job)


def train(trainer: Any, run_dir: Any, *changes: str, kind: str, bad: tuple[int, ...], workers: int = 1, **more: Any) -> Any:
    """A run with bad steps."""

    def with_faults(job: Any) -> Any:
        return (job, kind, bad)

    return trainer.train(run_dir, *_CHANGES, *changes, workers=workers, worker=bad_worker, change_job=with_faults, **more)


def state_after(run: Any, step: int) -> dict[str, torch.Tensor]:
    return load_file(run.path / "checkpoints" / f"step-{step:08d}" / "state.safetensors")


def users_of(trainer: Any, workers: int, *, step: int, micro_batch: int | None) -> list[int]:
    """The users of one micro-batch of rank 0, or of the whole step."""
    from rec_dist.config.schema import RunConfig
    from rec_dist.methods.registry import build_task, find_initial_weights
    from rec_dist.runtime.world import World
    from rec_dist.training.loader import step_work

    config = RunConfig.model_validate(trainer.config(trainer.new_dir(), *_CHANGES))
    task = build_task(config, find_initial_weights(config), "cpu")
    indices, _ = task.sampler.examples_of_step(step - 1)
    work = step_work(task, step - 1, max_tokens=config.train.max_tokens_per_micro_batch, world=World(0, workers))
    return task.data.users(indices if micro_batch is None else indices[list(work.micro_batches[micro_batch])])


@pytest.mark.parametrize(
    ("workers", "stage"), [(2, 0), *(pytest.param(*case, marks=pytest.mark.slow) for case in ((1, 0), (2, 2), (2, 3)))]
)
def test_a_bad_step_changes_nothing_on_any_rank_and_the_run_goes_on(trainer: Any, workers: int, stage: int) -> None:
    ends = []
    for kind in ("loss", "gradient", "loss alone"):
        run = train(trainer, trainer.new_dir(), f"cluster.zero_stage={stage}", kind=kind, bad=(3,), workers=workers)
        before, after, later = (state_after(run, step) for step in (2, 3, 4))
        assert all(torch.equal(after[name], value) for name, value in before.items())
        assert not all(torch.equal(later[name], value) for name, value in after.items())
        assert [row["step"] for row in run.steps] == [1, 2, 4, 5, 6]
        (bad,) = [row for row in run.rows if row["event"] == "bad_step"]
        users = users_of(trainer, workers, step=3, micro_batch=None if kind == "gradient" else 0)
        assert (bad["step"], bad["in_a_row"], bad["users"], bad["num_users"]) == (3, 1, users, len(users))
        assert (bad["loss"] == "inf") == (kind != "gradient")
        assert bad["grad_norm"] in ("nan", "inf")
        assert f"number {users[0]}" in run.log
        assert not re.search(r"\bu\d{3}\b", run.log + json.dumps(run.rows)), "no user by the name that the source has for them"
        ends.append(run)
    for run in ends[1:]:  # whatever was wrong, the same step is skipped
        assert run.steps == ends[0].steps
        assert all(torch.equal(run.weights[name], value) for name, value in ends[0].weights.items())
    assert len(users_of(trainer, workers, step=3, micro_batch=0)) < len(users_of(trainer, workers, step=3, micro_batch=None))


@pytest.mark.parametrize(("limit", "bad", "last"), [(0, (3,), 3), (2, (2, 3, 4, 5), 4)])
def test_too_many_in_a_row_fail_on_every_rank_and_name_the_users(
    trainer: Any, limit: int, bad: tuple[int, ...], last: int
) -> None:
    run_dir = trainer.new_dir()
    with pytest.raises(WorkerFailedError, match=f"step {last} was left out") as caught:
        train(trainer, run_dir, f"train.max_bad_steps={limit}", kind="loss", bad=bad, workers=2)
    assert caught.value.kind == "NotFiniteError"
    assert f"train.max_bad_steps is {limit}" in str(caught.value)
    assert re.search(rf"\b{users_of(trainer, 2, step=last, micro_batch=0)[0]}\b", str(caught.value))
    rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["step"] for row in rows if row["event"] == "bad_step"] == [step for step in bad if step <= last]


def test_a_row_is_counted_across_a_restart_and_a_good_step_ends_it(trainer: Any) -> None:
    run_dir = trainer.new_dir()
    changes = ("train.max_bad_steps=2", "train.max_steps=9")
    steps = (1, 2, 4, 5, 6, 7)  # 1 and 2 are two, 4 to 6 are three
    train(trainer, run_dir, *changes, kind="gradient", bad=steps, stop_after=5)
    with pytest.raises(WorkerFailedError, match="step 6 was left out"):
        train(trainer, run_dir, *changes, kind="gradient", bad=steps)
