"""What `rec-dist submit --dry-run` prints, against golden files and the readers that will receive it. Needs no scheduler.

After an intended change, run `python tests/launch/test_rendering.py` to rewrite the golden files, and read the difference.
"""

import contextlib
import io
import json
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.cli import main
from rec_dist.config.load import load_config

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
CONFIG = HERE / "cluster.yaml"
START = 'mkdir -p "$folder"\n'  # from here on a batch script is the same for every job
BODY = START + (ROOT / "launchers" / "slurm.sbatch.j2").read_text(encoding="utf-8").partition(START)[2]
APPTAINER = ("submit.slurm.container=apptainer", "submit.slurm.image=/shared/rec-dist.sif")
ENROOT = ("submit.slurm.container=enroot", "submit.slurm.image=rec-dist.sqsh", "submit.slurm.mounts=[/models:/models]")
CREDENTIALS = ("submit.kuberay.env_from_secret=s3", "submit.kuberay.service_account=trainer")
SERVE = ("submit.command=serve", "submit.kuberay.token_secret=serve-token", "submit.kuberay.suspend=false")
GPU = ("cluster.use_gpu=true",)
GOLDEN = {
    "ray.txt": ("ray",),
    "slurm.txt": ("slurm",),
    "slurm-apptainer.txt": ("slurm", *APPTAINER),
    "slurm-enroot.txt": ("slurm", *ENROOT),
    "slurm-evaluate.txt": ("slurm", "submit.command=evaluate", "evaluate.seed=2"),
    "kuberay.yaml": ("kuberay",),
    "kuberay-evaluate.yaml": ("kuberay", "submit.command=evaluate", "evaluate.num_candidates=all", *CREDENTIALS),
    "kuberay-serve.yaml": ("kuberay", *SERVE, "submit.serve.deadline_seconds=60", *CREDENTIALS),
}


def rendered(to: str, *overrides: str) -> str:
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(["submit", str(CONFIG), "--to", to, "--dry-run", *overrides]) == 0
    return out.getvalue()


def golden(name: str) -> str:
    """The rendered text; of a batch script only the part before the body, which launchers/ holds word for word."""
    text = rendered(*GOLDEN[name])
    assert text.endswith(BODY) == name.startswith("slurm")
    return text.removesuffix(BODY)


def shell(script: str, then: str, **variables: str) -> list[str]:
    """Runs the settings of a batch script as attempt 0 of job 7, then `then`. Returns the lines that it prints."""
    environment = {"SLURM_JOB_ID": "7", "PATH": "/usr/bin:/bin", **variables}
    command = ["bash", "-c", f"{script.partition(START)[0]}\n{then}"]
    return (
        subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.removesuffix("\n").split("\n")
    )


@pytest.mark.parametrize("name", sorted(GOLDEN))
def test_what_is_sent_is_what_was_agreed(name: str) -> None:
    assert golden(name) == (HERE / "golden" / name).read_text(encoding="utf-8")


def sent_config(to: str, tmp_path: Path) -> Any:
    """The configuration that is sent, as the run will read it."""
    text = rendered(to)
    if to == "ray":
        text = text.partition("# config.yaml\n")[2]
    elif to == "kuberay":
        text = next(yaml.safe_load_all(text))["data"]["config.yaml"]
    else:
        text = "\n".join(shell(text, 'printf "%s\\n" "$config"'))
    path = tmp_path / f"{to}.yaml"
    path.write_text(text, encoding="utf-8")
    return load_config(path)


def test_a_run_is_the_same_run_wherever_it_is_sent(tmp_path: Path) -> None:
    configs = [sent_config(to, tmp_path) for to in ("ray", "slurm", "kuberay")]
    assert configs[0] == configs[1] == configs[2]
    assert configs[0].train.run_dir == "/shared/runs/SDPO_8b"
    assert configs[0].train.init_from == "/elsewhere/sft"
    assert configs[0].data.source == "ml-1m"
    assert (configs[0].data.path, configs[0].model.path) == ("/shared/data/ml-1m", "/shared/models/llama")
    whole = load_config(CONFIG)
    for section in ("prompt", "task", "optimizer", "cluster", "negatives", "adapter", "checkpoint", "evaluate"):
        assert getattr(configs[0], section) == getattr(whole, section), section


def test_the_ray_request_is_what_the_client_takes() -> None:
    import inspect

    from ray.job_submission import JobSubmissionClient
    from ray.runtime_env import RuntimeEnv

    request = json.loads(rendered("ray").partition("\n\n# config.yaml")[0])
    assert set(request) - {"address", "working_dir"} <= set(inspect.signature(JobSubmissionClient.submit_job).parameters)
    RuntimeEnv(**request["runtime_env"])
    assert shlex.split(request["entrypoint"].split(";")[1]) == ["python", "-P", "-m", "rec_dist", "train", "config.yaml"]


REFUSED = [
    ("ray", ["submit.storage=null"], ("data.path (data/ml-1m)", "submit.storage")),
    ("kuberay", ["submit.storage=null", "data.path=/d", "model.path=/m", "train.run_dir=/r"], ("submit.storage", "mount")),
    ("slurm", ["submit.storage=shared"], ("submit.storage (shared)", "absolute")),
    ("slurm", ["submit.slurm.nodez=2"], ("submit.slurm.nodez", "submit.slurm.nodes")),
    (
        "slurm",
        ["submit.slurm.gpus_per_node=3", "cluster.num_workers=8"],
        ("cluster.num_workers (8)", "submit.slurm.gpus_per_node (3)"),
    ),
    ("slurm", ["submit.slurm.container=apptainer"], ("submit.slurm.image", "set both")),
    ("slurm", ["optimizer.lr=-1"], ("optimizer.lr",)),
    ("slurm", ["submit.slurm.log_dir=/a b"], ("submit.slurm.log_dir (/a b)",)),
    ("ray", ["submit.ray.ship=wheel"], ("submit.ray.wheel", "submit.ray.ship")),
    ("ray", ["submit.ray.ship=wheel", f"submit.ray.wheel={CONFIG}"], ("submit.ray.wheel", "pip wheel")),
    ("ray", ["train.run_dir=~/run"], ("train.run_dir (~/run)", "home")),
    ("ray", ["submit.name=__"], ("submit.name (__)",)),
    ("slurm", [*GPU, "submit.slurm.gpus_per_node=0"], ("cluster.use_gpu=true", "submit.slurm.gpus_per_node is 0")),
    ("slurm", [*GPU, "submit.slurm.gpus_per_node=0", "submit.command=evaluate"], ("submit.slurm.gpus_per_node is 0",)),
    ("slurm", ["cluster.launcher=local"], ("cluster.launcher=local", "submit.slurm.nodes is 2")),
    ("slurm", ["cluster.num_workers=17"], ("cluster.num_workers (17)", "16 GPU(s)")),
    ("kuberay", ["submit.kuberay.gpus_per_worker=7"], ("cluster.num_workers (16)", "14 GPU(s)", "submit.kuberay.workers (2)")),
    ("kuberay", [*GPU, "submit.kuberay.gpus_per_worker=0"], ("cluster.use_gpu=true", "submit.kuberay.gpus_per_worker is 0")),
    ("kuberay", ["cluster.launcher=local"], ("cluster.launcher=local", "no GPU")),
    ("kuberay", ["submit.kuberay.job_name=A_b"], ("A_b", "submit.kuberay.job_name")),
    ("slurm", ["submit.slurm.time=tomorrow"], ("submit.slurm.time (tomorrow)", "D-H:M:S")),
    ("slurm", ["submit.slurm.time=00:10"], ("submit.slurm.time (00:10)", "10 s", "checkpoint.grace_seconds (300)")),
    (
        "slurm",
        ["checkpoint.grace_seconds=1000", 'submit.slurm.time="00:10:00"'],
        ("submit.slurm.time (00:10:00)", "600 s", "1090 s"),
    ),
    ("slurm", ["submit.slurm.partition=a b"], ("submit.slurm.partition (a b)", "space")),
    ("slurm", ["submit.slurm.account=''"], ("submit.slurm.account", "empty")),
    ("ray", ["submit.ray.address=HEAD:8265"], ("submit.ray.address (HEAD:8265)", "http://HEAD:8265")),
    ("ray", ["submit.ray.address=ray://HEAD:10001"], ("submit.ray.address (ray://HEAD:10001)", "http://")),
    ("ray", ["train.run_dir=s3://bucket/run"], ("train.run_dir (s3://bucket/run) is a URI", "checkpoint.remote")),
    ("ray", ["train.run_dir=''"], ("train.run_dir is empty",)),
    ("ray", ["task.delrec.teacher=s3://bucket/run"], ("task.delrec.teacher (s3://bucket/run) is a URI",)),
    ("slurm", ["submit.command=evaluate", "evaluate.ranker=popularity"], ("evaluate.ranker (popularity)", "evaluate_base")),
    ("ray", ["submit.env.OMP_NUM_THREADS=4"], ("submit.env.OMP_NUM_THREADS", "'submit.env.OMP_NUM_THREADS=\"4\"'")),
    ("ray", ["submit.env={A-B: text}"], ("submit.env (A-B)", "letters")),
    ("slurm", ["submit.slurm.template=nowhere"], ("submit.slurm.template (nowhere)", "slurm.sbatch.j2")),
    ("ray", ["submit.command=serve"], ("submit.command=serve", "--to kuberay", "rec-dist serve")),
    ("slurm", ["submit.command=serve"], ("submit.command=serve", "--to kuberay", "rec-dist serve")),
    ("kuberay", [*SERVE, "submit.kuberay.token_secret=null"], ("submit.kuberay.token_secret", "REC_DIST_SERVE_TOKEN", "kubectl")),
    (
        "kuberay",
        [*SERVE, "submit.env.REC_DIST_SERVE_TOKEN=token"],
        ("submit.env.REC_DIST_SERVE_TOKEN", "submit.kuberay.token_secret"),
    ),
    ("kuberay", [*SERVE, "submit.kuberay.suspend=true"], ("submit.kuberay.suspend", "RayService")),
    ("kuberay", [*SERVE, "submit.serve.queue=0"], ("submit.serve.queue",)),
    ("kuberay", [*SERVE, "submit.kuberay.job_name=A_b"], ("A_b", "RayService", "submit.kuberay.job_name")),
    ("kuberay", [*SERVE, "cluster.num_workers=17"], ("cluster.num_workers (17)", "16 GPU(s)")),
    ("kuberay", [*SERVE, "cluster.num_workers=1"], ("submit.kuberay.workers (2)", "cluster.num_workers (1)")),
    (
        "kuberay",
        [*SERVE, "cluster.use_gpu=false", "cluster.num_workers=194"],
        ("cluster.num_workers (194)", "submit.kuberay.cpus_per_worker (96)"),
    ),
    ("kuberay", [*SERVE, "cluster.cpus_per_worker=13"], ("cluster.cpus_per_worker (13", "submit.kuberay.cpus_per_worker (96)")),
    ("kuberay", [*SERVE, "train.run_dir=s3://bucket/run"], ("train.run_dir (s3://bucket/run) is a URI",)),
]


@pytest.mark.parametrize(
    ("to", "overrides", "names"), REFUSED, ids=lambda value: "+".join(value) if isinstance(value, list) else ""
)
def test_a_bad_configuration_is_refused_before_anything_is_sent(
    to: str, overrides: list[str], names: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["submit", str(CONFIG), "--to", to, "--dry-run", *overrides]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert len(err.splitlines()) == 1
    assert err.startswith("error: ")
    assert [name for name in names if name not in err] == []


@pytest.mark.parametrize(
    "words",
    [[], [str(CONFIG)], ["--follow", "a", "--stop", "b"], ["--follow", "a", "--to", "slurm"], [str(CONFIG), "--too", "ray"]],
)
def test_half_a_command_is_refused(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", *words]) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_submitting_to_slurm_loads_no_ray() -> None:
    words = ["submit", str(CONFIG), "--to", "slurm", "--dry-run"]
    code = f"import sys; from rec_dist.cli import main; main({words!r}); assert 'ray' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


if __name__ == "__main__":
    for name in GOLDEN:
        (HERE / "golden" / name).write_text(golden(name), encoding="utf-8")
