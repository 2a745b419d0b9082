"""A method from a package outside the checkout, on real Ray workers and through the command line. Starts Ray five times."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from outside_method import write_entry_point, write_package
from real_runs import came_to, command, finish, wait_until, write_config

pytestmark = pytest.mark.slow

_CHANGES = (
    "task.kind=hinge",
    "task.hinge.margin=2.0",
    "cluster.launcher=ray",
    "cluster.num_workers=2",
    "cluster.cpus_per_worker=0.5",
    "cluster.zero_stage=3",
    "train.global_batch_size=4",
    "train.max_steps=12",
    "checkpoint.every_steps=100",
)


def on_path(*folders: Path) -> dict[str, str]:
    """The environment in which `folders` can be imported."""
    return {"PYTHONPATH": os.pathsep.join([*map(str, folders), *filter(None, [os.environ.get("PYTHONPATH")])])}


def test_a_plugin_and_an_entry_point_train_the_same_and_every_command_takes_them(trainer: Any, tmp_path: Path) -> None:
    """By plugin: stopped, resumed, evaluated, planned, merged. By entry point: one undisturbed run with the same weights."""

    from rec_dist.data.artifacts.predictions import Predictions
    from rec_dist.data.dataset.prepared_data import PreparedData

    package = write_package(tmp_path / "package")
    plugin, run_dir = on_path(package), tmp_path / "by-plugin"
    config = trainer.config(run_dir, *_CHANGES, "task.plugin=hinge_method:HINGE")
    path = write_config(tmp_path / "plugin.yaml", config)
    process = command("train", path, **plugin)
    wait_until(came_to(run_dir, 2), process)
    process.send_signal(signal.SIGTERM)
    assert (ended := finish(process))[0] == 75, ended[1]
    assert (ended := finish(command("train", path, **plugin)))[0] == 0, ended[1]
    run = trainer.read(run_dir)
    assert [row["event"] for row in run.rows].count("resume") == 1
    assert [row["step"] for row in run.steps] == list(range(1, 13))
    assert all(0 <= row["hinge/violations"] <= 1 for row in run.steps)
    losses = [row["loss"] for row in run.steps]
    assert sum(losses[6:]) < sum(losses[:6])

    installed = on_path(package, write_entry_point(tmp_path / "installed"))
    other = write_config(tmp_path / "entry.yaml", trainer.config(tmp_path / "by-entry-point", *_CHANGES))
    assert (ended := finish(command("train", other, **installed)))[0] == 0, ended[1]
    same = trainer.read(tmp_path / "by-entry-point")
    assert same.steps == run.steps
    assert all(torch.equal(same.weights[name], value) for name, value in run.weights.items())

    assert (ended := finish(command("evaluate", run_dir, "evaluate.max_users=4", **plugin)))[0] == 0, ended[1]
    apart = ("task.hinge.popularity=0.5", f"evaluate.output_dir={tmp_path / 'popular'}", "evaluate.max_users=4")
    assert (ended := finish(command("evaluate", run_dir, *apart, **plugin)))[0] == 0, ended[1]
    plain, popular = (Predictions.read(folder / "predictions.arrow") for folder in (run_dir, tmp_path / "popular"))
    counts = PreparedData.open(config["data"]["path"]).train_counts
    for before, after, candidates in zip(plain.scores, popular.scores, plain.candidates, strict=True):
        np.testing.assert_allclose(after - before, 0.5 * np.log1p(counts[candidates]), atol=1e-4)
    assert (
        next(row for row in trainer.read(tmp_path / "popular").rows if row["event"] == "evaluation")["popularity_weight"] == 0.5
    )

    planned = command("plan", path, "plan.cluster=8xh100", "cluster.num_workers=auto", "--json", tmp_path / "plan.json", **plugin)
    assert (ended := finish(planned))[0] == 0, ended[1]
    plan = json.loads((tmp_path / "plan.json").read_text(encoding="utf-8"))
    assert (plan["settings"]["task.kind"], plan["workload"]["negatives"]) == ("hinge", 3)
    assert plan["run"]["reference_seconds"] == 0

    assert (ended := finish(command("export", run_dir, "--out", tmp_path / "merged", "--format", "merged", **plugin)))[0] == 0, (
        ended[1]
    )
    assert {"config.json", "prompt.json"} <= {file.name for file in (tmp_path / "merged").iterdir()}
    assert not list((tmp_path / "merged").glob("adapter*"))


def test_without_its_package_a_run_is_refused_with_the_way_out(trainer: Any, tmp_path: Path) -> None:
    path = write_config(tmp_path / "config.yaml", trainer.config(tmp_path / "run", *_CHANGES))
    code, err = finish(command("train", path))
    assert code == 2 and "task.kind" in err and "task.plugin=module:object" in err, err
    assert not (tmp_path / "run").exists()
