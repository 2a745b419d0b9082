"""Small recommenders of every kind, and a data set in which item (i + 1) % CYCLE always follows item i. Cost: milliseconds."""

from pathlib import Path

import torch

from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.data.prepare.prepare import prepare
from rec_dist.methods.sequential.caser import CaserShape
from rec_dist.methods.sequential.gru4rec import GRU4RecShape
from rec_dist.methods.sequential.next_item import Recommender
from rec_dist.methods.sequential.sasrec import SASRecShape
from rec_dist.methods.task import Task
from rec_dist.runtime.world import World
from rec_dist.training.loader import step_work

SHARED = {"num_items": 37, "width": 16, "dropout": 0.3, "max_length": 12}
SHAPES = {
    "sasrec": SASRecShape(**SHARED, num_layers=2, num_heads=2),
    "gru4rec": GRU4RecShape(**SHARED, state_width=10, num_layers=2),
    "caser": CaserShape(**SHARED, window=5, num_horizontal=3, num_vertical=2),
}
SMALL = {
    "sasrec": {"num_heads": 2},
    "gru4rec": {"num_layers": 1, "state_width": 32},
    "caser": {"window": 3, "num_horizontal": 8},
}
NUM_USERS, CYCLE = 24, 11


def config(
    folder: Path,
    *,
    kind: str = "sasrec",
    width: int = 16,
    max_length: int = 8,
    cycle: int = CYCLE,
    more: dict | None = None,
    **train: object,
) -> RunConfig:
    """A data set in which item (i + 1) % cycle always follows item i; rows of 8 to 11 items, the last two held out."""
    path = folder / "rows.csv"
    if not path.exists():
        lines = ["user,item,timestamp"]
        for user in range(NUM_USERS):  # one round at most: a user never repeats an item
            lines += [f"u{user},i{(user + step) % cycle:02d},{step}" for step in range(8 + user % 4)]
        path.write_text("\n".join(lines) + "\n")
        data = DataConfig(source=str(path), path=str(folder / "data"), split="leave_one_out", min_user_interactions=1)
        prepare(data)
    sequential = {"model": kind, "width": width, "dropout": 0.0, "max_length": max_length, **SMALL[kind], **(more or {})}
    return RunConfig.model_validate(
        {
            "data": {"source": str(path), "path": str(folder / "data"), "split": "leave_one_out"},
            "task": {"kind": "sequential", "sequential": sequential},
            "train": {"run_dir": str(folder / "run"), "global_batch_size": 8, "max_tokens_per_micro_batch": 64, **train},
        }
    )


def train(task: Task) -> Recommender:
    module = task.model.build().train()
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-2)
    for step in range(task.sampler.num_steps):
        work = step_work(task, step, max_tokens=64, world=World())
        optimizer.zero_grad()
        for batch in work.batches:
            (module(batch)[0] / work.num_scored).backward()
        optimizer.step()
    return module.model
