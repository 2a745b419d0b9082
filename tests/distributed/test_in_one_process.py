"""Training leaves nothing behind in its process: a second run there, in any thread, equals the run of a fresh process."""

import os
import threading
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from worker_processes import start

FIRST = ("task.kind=sdpo", "cluster.zero_stage=3")
SECOND = ("task.kind=dmpo", "cluster.zero_stage=0", "checkpoint.validation_examples=8")


def surroundings() -> dict[str, Any]:
    """What a library could have left in this process."""
    import logging

    import deepspeed
    import torch.distributed as dist
    from deepspeed.utils import groups
    from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled

    return {
        "environment": dict(os.environ),
        "in a group": dist.is_initialized(),
        "cached groups": [groups._WORLD_GROUP, groups._DATA_PARALLEL_GROUP],
        "operations": dict(deepspeed.ops.__compatible_ops__),
        "loads shards": is_deepspeed_zero3_enabled(),
        "level": logging.getLogger("DeepSpeed").level,
        "threads": {thread.name for thread in threading.enumerate()},
    }


def in_a_thread(jobs: list[Any], notes: Path) -> int:
    """Runs train_worker for each job, one after another, in a thread that is not the main one. A fault ends that run only."""
    from rec_dist.errors import UserError
    from rec_dist.runtime.world import World
    from rec_dist.training.worker import train_worker

    lines: list[str] = []

    def work() -> None:
        before = surroundings()
        for job in jobs:
            try:
                lines.append(f"finished: {train_worker(World(), job)['finished']}")
            except UserError as fault:
                lines.append(f"UserError: {fault}")
            after = surroundings()
            lines.extend(f"changed: {name}" for name, value in before.items() if after[name] != value)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    notes.write_text("\n".join(lines), encoding="utf-8")
    return 0


def states(run_dir: Path) -> dict[str, dict[str, torch.Tensor]]:
    """Weights and Adam state of every checkpoint, and the saved adapter."""
    files = [*run_dir.glob("checkpoints/step-*/state.safetensors"), *run_dir.glob("model/*.safetensors")]
    assert len(files) == 3
    return {str(file.relative_to(run_dir)): load_file(file) for file in files}


def equal(one: dict[str, dict[str, torch.Tensor]], two: dict[str, dict[str, torch.Tensor]]) -> bool:
    return one.keys() == two.keys() and all(
        one[file].keys() == two[file].keys() and all(torch.equal(value, two[file][name]) for name, value in one[file].items())
        for file in one
    )


def test_two_runs_in_a_thread_are_those_of_two_processes(trainer: Any, tmp_path: Path) -> None:
    """Between them a UserError ends a run inside the process group. The runs use two kinds of reference and two ZeRO stages."""
    alone = [trainer.once(*changes).path for changes in (FIRST, SECOND)]
    here = [trainer.new_dir() for _ in range(3)]
    broken = trainer.claim(here[2], ("checkpoint.keep_best=valid_loss",))
    jobs = [trainer.claim(here[0], FIRST), broken, trainer.claim(here[1], SECOND)]
    child = start(in_a_thread, jobs, tmp_path / "notes", folder=tmp_path / "out", environment={"RANK": "7", "MASTER_PORT": "1"})
    assert child.wait() == 0, child.err
    lines = (tmp_path / "notes").read_text(encoding="utf-8").splitlines()
    assert lines[0] == lines[2] == "finished: True" and lines[1].startswith("UserError: checkpoint.keep_best")
    assert len(lines) == 3, lines
    for one, other in zip(alone, here[:2], strict=True):
        assert equal(states(one), states(other))
