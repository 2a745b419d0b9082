"""Secrets of a configuration stand nowhere: a whole pipeline and three submits, and every byte that they wrote or showed.

One secret for each way in. Those of the environment and of `submit` may be in memory, and in what a job gets; nowhere else.
"""

import contextlib
import os
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

pytestmark = pytest.mark.slow

SECRETS = {
    "unused": "swordfish-of-the-environment",  # WANDB_API_KEY and the like: no configuration names it
    "variable": "swordfish-by-way-of-vars",
    "key": "swordfish-in-a-key",
    "number": "swordfish-where-a-number-belongs",
    "stage": "swordfish-in-a-stage",
    "job": "swordfish-for-a-job",
    "written": "swordfish-written-into-submit",
    "typed": "swordfish-typed-behind-submit",
}
NAMES = {name: f"REC_DIST_TEST_{name.upper()}" for name in ("unused", "variable", "key", "number", "stage", "job")}
IN_MEMORY = {NAMES[name]: SECRETS[name] for name in NAMES}


def of_environment(name: str) -> str:
    return f"${{oc.env:{NAMES[name]}}}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory, tiny_config: Callable[..., dict[str, Any]]) -> Path:
    """The files of a user, who has secrets in a configuration and in a pipeline, in `own`. Commands write into `made`."""
    folder = tmp_path_factory.mktemp("secrets")
    own, made = folder / "own", folder / "made"
    own.mkdir()
    made.mkdir()
    config = tiny_config(
        made / "run",
        "train.max_steps=2",
        "track.tensorboard=true",
        {"data.path": str(made / "data"), "checkpoint.remote": str(made / "copy")},
    )
    config["vars"] = {"token": of_environment("variable")}
    config["cluster"]["address"] = "${vars.token}"  # text that a local run does not use
    config["track"]["project"] = f"p-{of_environment('key')}"
    config["submit"] = {
        "storage": "/shared",
        "env": {"JOB": of_environment("job"), "WRITTEN": SECRETS["written"]},
        "slurm": {"nodes": 1, "time": "1:00:00"},
        "kuberay": {"workers": 1, "gpus_per_worker": 0, "job_name": "a"},
    }
    (own / "run.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    at_stage = [f"track.project={of_environment('stage')}", f"submit.env.TYPED={SECRETS['typed']}"]
    stages = [
        {"name": "prepare", "do": "prepare", "target": "run.yaml"},
        {"name": "train", "do": "train", "target": "run.yaml", "set": at_stage},
        {"name": "of the run", "do": "evaluate", "target": str(made / "run"), "set": ["cluster.address=null"]},
        {"name": "of the base model", "do": "evaluate", "target": "run.yaml", "set": at_stage},
    ]
    pipeline = {"title": "t", "run_dir": str(made / "report"), "stages": stages, "pairs": [["of the run", "of the base model"]]}
    (own / "pipeline.yaml").write_text(yaml.safe_dump({"pipeline": pipeline}), encoding="utf-8")
    return folder


def rec_dist(*words: object, folder: Path) -> subprocess.CompletedProcess[str]:
    line = [sys.executable, "-P", "-m", "rec_dist", *map(str, words)]
    environment = {**os.environ, **IN_MEMORY, "PYTHONPATH": os.pathsep.join(sys.path)}
    return subprocess.run(line, capture_output=True, text=True, env=environment, cwd=folder / "made", timeout=500, check=False)


@contextlib.contextmanager
def command_lines() -> Iterator[set[bytes]]:
    """The command lines of all processes that ran meanwhile, as `ps` shows them."""
    found, ended = set[bytes](), threading.Event()

    def look() -> None:
        while not ended.wait(0.05):
            for path in Path("/proc").glob("[0-9]*/cmdline"):
                with contextlib.suppress(OSError):
                    found.add(path.read_bytes())

    thread = threading.Thread(target=look)
    thread.start()
    try:
        yield found
    finally:
        ended.set()
        thread.join()


def places_of(secret: str, folder: Path, texts: dict[str, bytes]) -> list[str]:
    """Where a secret stands: files below `folder`, by their contents or names, and texts."""
    found = [str(path) for path in folder.rglob("*") if path.is_file() and secret.encode() in path.read_bytes()]
    found += [str(path) for path in folder.rglob("*") if secret in path.name]
    return found + [name for name, text in texts.items() if secret.encode() in text]


def test_no_secret_stands_in_what_a_pipeline_writes_and_shows(folder: Path) -> None:
    with command_lines() as lines:
        done = rec_dist("run", folder / "own" / "pipeline.yaml", folder=folder)
    assert done.returncode == 0, done.stderr[-3000:]
    typed = {"typed"}  # `ps` shows what a stage's own words say literally, as it shows every command line
    shown = {"out": done.stdout.encode(), "err": done.stderr.encode(), "ps": b"\n".join(lines)}
    assert b"rec_dist" in shown["ps"] and b"evaluate" in shown["ps"], "the stages were seen"
    for name, secret in SECRETS.items():
        texts = {place: text for place, text in shown.items() if not (name in typed and place == "ps")}
        assert places_of(secret, folder / "made", texts) == [], name
    written = [folder / "made" / "run" / name for name in ("config.yaml", "config.json", "environment.json")]
    written += [folder / "made" / "copy" / "config.yaml", folder / "made" / "report" / "report.html"]
    for path in written:
        assert path.is_file(), path
    assert of_environment("variable") in written[0].read_text() and "submit" not in written[0].read_text()
    assert "submit.env.TYPED=..." in written[2].read_text()
    assert list((folder / "made" / "run").glob("**/events.out.tfevents*")), "a tracker wrote"


def test_the_same_command_finds_the_run_again(folder: Path) -> None:
    done = rec_dist("train", folder / "own" / "run.yaml", folder=folder)
    assert (done.returncode, "nothing to do" in done.stderr) == (0, True), done.stderr


@pytest.mark.quick
@pytest.mark.parametrize("to", ["ray", "slurm", "kuberay"])
def test_no_secret_of_the_environment_stands_in_what_is_sent(folder: Path, to: str) -> None:
    words = ["submit", folder / "own" / "run.yaml", "--to", to, "--dry-run", "cluster.launcher=ray"]
    done = rec_dist(*words, folder=folder)
    if to == "slurm":
        assert done.returncode == 0, done.stderr
        assert f'export JOB="${{{NAMES["job"]}:?' in done.stdout
        assert of_environment("variable") in done.stdout, "it resolves where the job runs"
    else:  # the request stands in a dashboard, the manifest in Kubernetes
        assert done.returncode == 2
        assert "submit.env.JOB" in done.stderr
        plain = yaml.safe_load((folder / "own" / "run.yaml").read_text())
        del plain["submit"]["env"]["JOB"]
        (folder / "own" / "plain.yaml").write_text(yaml.safe_dump(plain))
        again = rec_dist("submit", folder / "own" / "plain.yaml", *words[2:], folder=folder)
        assert again.returncode == 0, again.stderr
        assert of_environment("variable") in again.stdout
        done.stdout, done.stderr = done.stdout + again.stdout, done.stderr + again.stderr
    for name in NAMES:
        assert places_of(SECRETS[name], folder / "made", {"out": done.stdout.encode(), "err": done.stderr.encode()}) == [], name


@pytest.mark.quick
def test_the_batch_script_passes_a_variable_on(folder: Path) -> None:
    script = rec_dist(
        "submit", folder / "own" / "run.yaml", "--to", "slurm", "--dry-run", "cluster.launcher=ray", folder=folder
    ).stdout
    head = script.partition('mkdir -p "$folder"')[0]
    for environment, output in ((IN_MEMORY, SECRETS["job"]), ({}, "")):
        environment = {**environment, "SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin"}
        done = subprocess.run(
            ["bash", "-c", f"{head}\nprintenv JOB"], env=environment, capture_output=True, text=True, check=False
        )
        assert done.stdout.strip() == output
        assert (done.returncode == 0) == bool(output)


def test_a_message_shows_no_secret(folder: Path) -> None:
    done = rec_dist("train", folder / "own" / "run.yaml", f"optimizer.lr={of_environment('number')}", folder=folder)
    assert done.returncode == 2
    assert f"optimizer.lr: input should be a valid number, got '{of_environment('number')}'" in done.stderr
    assert SECRETS["number"] not in done.stdout + done.stderr
