"""What the manager refuses to load, and a save that has to wait for the one before."""

import dataclasses
import re
import threading
from pathlib import Path
from typing import Any

import pytest
import torch

from rec_dist.checkpoint.files import CheckpointMetadata
from rec_dist.checkpoint.manager import CheckpointManager, RetentionPolicy
from rec_dist.checkpoint.state_files import Entry, StateFile, StateWriter
from rec_dist.errors import UserError
from rec_dist.runtime.world import World

OWN = CheckpointMetadata(base="ab", config="cd", sampler={"seed": 0, "num_examples": 9, "global_batch_size": 3}, versions={})


class Engine:
    """A state of one tensor, which a save gets at once, or when deliver() is called, as from a disk that is late."""

    def __init__(self, *, late: bool = False) -> None:
        self.loaded: list[str] = []
        self._late, self._writers = late, list[StateWriter]()

    def save_state(self, folder: Path, *, asynchronous: bool) -> StateWriter:
        writer = StateWriter(folder, [StateFile("state.safetensors", (Entry("w", (2,)),))], asynchronous=asynchronous)
        self._writers.append(writer)
        if not self._late:
            self.deliver()
        return writer

    def deliver(self) -> None:
        self._writers.pop().put(torch.zeros(2))

    def load_state(self, folder: Path) -> None:
        self.loaded.append(folder.name)


def manager(folder: Path, said: list[str], rows: list[dict[str, Any]], metadata: CheckpointMetadata = OWN) -> CheckpointManager:
    folder.mkdir(exist_ok=True)
    policy = RetentionPolicy(keep=2, best=False, asynchronous=True, stop_on_fault=True)
    return CheckpointManager(
        folder, World(), metadata, policy, zero_stage=0, log=said.append, record=rows.append, before_commit=lambda: None
    )


def test_a_save_that_waits_for_the_one_before_says_so(tmp_path: Path) -> None:
    said: list[str] = []
    rows: list[dict[str, Any]] = []
    checkpoints, engine = manager(tmp_path / "checkpoints", said, rows), Engine(late=True)
    checkpoints.save(engine, 3, epoch=0)
    assert checkpoints.writing and not checkpoints.committed(), "it is written in the background"
    threading.Timer(1.6, engine.deliver).start()
    checkpoints.save(engine, 6, epoch=0)
    assert checkpoints.committed() == [3], "the older one is whole before the next begins"
    assert len(said) == 1, said
    assert re.match(r"WARNING: step 6 waited \d+\.\d s for the checkpoint of step 3 .*checkpoint\.every_steps", said[0])
    engine.deliver()
    checkpoints.settle()
    assert checkpoints.committed() == [3, 6]
    assert [row["step"] for row in rows] == [3, 6]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"base": "ef"}, "belongs to a base model of fingerprint ab, and model.path holds one of ef"),
        ({"config": "ef"}, "belongs to another configuration"),
        ({"sampler": {**OWN.sampler, "seed": 1}}, "belongs to another configuration"),
        ({"sampler": {**OWN.sampler, "global_batch_size": 4}}, "belongs to another configuration"),
    ],
)
def test_a_checkpoint_of_another_base_or_configuration_is_refused(tmp_path: Path, change: dict[str, Any], says: str) -> None:
    engine = Engine()
    own = manager(tmp_path / "checkpoints", [], [])
    own.save(engine, 3, epoch=0)
    own.settle()
    assert manager(tmp_path / "checkpoints", [], []).restore(engine) == 3
    other = manager(tmp_path / "checkpoints", [], [], dataclasses.replace(OWN, **change))
    with pytest.raises(UserError, match=says) as caught:
        other.restore(engine)
    assert "choose another train.run_dir" in str(caught.value)
    assert engine.loaded == ["step-00000003"], "the refused one was not loaded"
    assert own.committed() == [3], "nor touched"
