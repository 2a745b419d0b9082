"""A finished run of a small SASRec, made in a second without workers: data with ids that only text keeps, and titles.

User "00n" takes a round through CYCLE items, so the next item is known. Item n has the id "0n" and a title of two words.
"""

import os
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from small_recommenders import train

from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.config.yaml_text import to_yaml
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.data.prepare.prepare import prepare
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.methods.sequential.saved_model import save_recommender
from rec_dist.runtime.run_directory import RunDirectory

NUM_USERS, CYCLE = 24, 11


def raw_item(number: int) -> str:
    """The id of item `number` in the source."""
    return f"{number:02d}"


def title(number: int) -> str:
    """The title of item `number`."""
    return f"Film {'abcdefghijk'[number]}"


def items_of(user: int) -> list[int]:
    """The numbers of all items of a user, in order."""
    return [(user + step) % CYCLE for step in range(8 + user % 4 - (user % 4 == 3))]


def write_source(folder: Path) -> DataConfig:
    """Writes the interactions, prepares them in folder/data, and returns their configuration."""
    lines = ["user,item,timestamp,title"]
    for user in range(NUM_USERS):
        lines += [f"{user:03d},{raw_item(item)},{step},{title(item)}" for step, item in enumerate(items_of(user))]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    data = DataConfig(source=str(folder / "rows.csv"), path=str(folder / "data"), split="leave_one_out", min_user_interactions=1)
    prepare(data)
    return data


def finished_run(folder: Path) -> Path:
    """Trains on the data of write_source and returns the run directory."""
    data = write_source(folder)
    config = RunConfig.model_validate(
        {
            "data": data.model_dump(),
            "task": {
                "kind": "sequential",
                "sequential": {"model": "sasrec", "width": 16, "num_heads": 2, "dropout": 0.0, "max_length": 8},
            },
            "train": {"run_dir": str(folder / "run"), "global_batch_size": 8, "max_tokens_per_micro_batch": 64, "epochs": 30},
        }
    )
    run = RunDirectory(folder / "run")
    with torch.random.fork_rng(devices=[]), run.claimed(config.model_dump(mode="json"), to_yaml(config)):
        torch.manual_seed(0)
        model = train(build_task(config, InitialWeights(Path()), "cpu"))
        run.model.mkdir()
        save_recommender(model.shape, dict(model.state_dict()), open_data(config.data), run.model)
        run.finish({"step": 1})
    return run.path


def other_run(run: Path, folder: Path) -> Path:
    """The same run with another model: the elements of every embedding in reverse order."""
    shutil.copytree(run, folder)
    (weights,) = (folder / "model").glob("*.safetensors")
    state = load_file(weights)
    name = next(name for name, value in state.items() if "item" in name and value.ndim == 2)
    state[name] = state[name].flip(1).contiguous()
    save_file(state, weights)
    return folder


def point(link: Path, run: Path) -> None:
    """Makes the link lead to another run, in one step."""
    new = link.with_name("new")
    new.symlink_to(run)
    os.replace(new, link)
