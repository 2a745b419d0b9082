"""What `rec-dist submit` makes of a configuration, one rule a test: GPUs, names, evaluations, time limits, quoting."""

import json
import re
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_kuberay_schema import manifest, service
from test_rendering import CONFIG, CREDENTIALS, GPU, SERVE, rendered, shell

from rec_dist.cli import main


def sbatch_options(*overrides: str) -> list[str]:
    return [line.removeprefix("#SBATCH ") for line in rendered("slurm", *overrides).splitlines() if line.startswith("#SBATCH ")]


def command_line(*overrides: str) -> list[str]:
    """The words that a batch script runs."""
    return shell(rendered("slurm", *overrides), 'printf "%s\\n" "${command[@]}"')


def workers_of(ray_job: Any) -> Any:
    return ray_job["spec"]["rayClusterSpec"]["workerGroupSpecs"][0]["template"]["spec"]


def pods_of(ray_job: Any) -> list[Any]:
    return [ray_job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"], workers_of(ray_job)]


def test_prepare_asks_for_no_gpu() -> None:
    for overrides in ((), GPU, (*GPU, "submit.slurm.gpus_per_node=0", "submit.kuberay.gpus_per_worker=0")):
        assert not [
            option for option in sbatch_options("submit.command=prepare", *overrides) if "gpu" in option.replace("=gpu", "")
        ]
        limits = workers_of(manifest("submit.command=prepare", *overrides)[1])["containers"][0]["resources"]["limits"]
        assert set(limits) == {"cpu", "memory"}
    assert "--gpus-per-node=8" in sbatch_options()


@pytest.mark.parametrize("overrides", [("submit.slurm.options=[--gres=gpu:8]", *GPU), ("cluster.use_gpu=false",)])
def test_gpus_that_are_asked_for_otherwise_or_not_wanted_are_no_mistake(overrides: tuple[str, ...]) -> None:
    assert "--gpus-per-node" not in " ".join(sbatch_options("submit.slurm.gpus_per_node=0", *overrides))


@pytest.mark.parametrize("to", ["slurm", "kuberay"])
def test_gpus_that_will_idle_are_named_in_one_line(to: str, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["submit", str(CONFIG), "--to", to, "--dry-run"]
    assert main([*words, "cluster.num_workers=8"]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert len(notes) == 1
    assert re.search(r"\b16 GPUs, and 8 are used \(cluster.num_workers\)", notes[0])
    assert main(words) == 0
    assert "note: " not in capsys.readouterr().err


@pytest.mark.parametrize(("overrides", "keys"), [((), ["train.run_dir", "data.path"]), (SERVE, ["data.path"])])
def test_paths_that_pods_do_not_share_are_named(
    overrides: tuple[str, ...], keys: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """The config.yaml of a run has absolute paths of the machine that trained it."""
    words = ["submit", str(CONFIG), "--to", "kuberay", "--dry-run", "submit.storage=/shared", "data.path=/home/me/data"]
    assert main([*words, *(["train.run_dir=/shared-not/run"] if "train.run_dir" in keys else []), *overrides]) == 0
    notes = [line for line in capsys.readouterr().err.splitlines() if line.startswith("note: ")]
    assert [line.split()[1] for line in notes] == keys
    assert all("outside submit.storage (/shared)" in line for line in notes)


def test_a_dry_run_says_that_only_keys_have_been_checked(capsys: pytest.CaptureFixture[str]) -> None:
    for to in ("ray", "slurm", "kuberay"):
        assert main(["submit", str(CONFIG), "--to", to, "--dry-run"]) == 0
        assert "only the keys have been checked" in capsys.readouterr().err


def test_an_evaluation_is_that_of_the_run() -> None:
    words = ["submit.command=evaluate", "evaluate.max_users=7", "evaluate.output_dir=results/x", "evaluate.split=valid"]
    words += ["evaluate.questions=rows.csv"]
    sent = ["/shared/runs/SDPO_8b", "data.path=/shared/data/ml-1m", "evaluate.split=valid", "evaluate.targets=last"]
    sent += ["evaluate.questions=/shared/rows.csv", "evaluate.ranker=model", "evaluate.negatives=uniform"]
    sent += ["evaluate.num_candidates=20", "evaluate.search=all"]
    sent += ["evaluate.exclude_seen=true", "evaluate.title_prior=0.0", "evaluate.length_power=0.0", "evaluate.max_users=7"]
    sent += ["evaluate.seed=0", "evaluate.output_dir=/shared/results/x"]
    entrypoint = json.loads(rendered("ray", *words).partition("\n\n# config.yaml")[0])["entrypoint"]
    lines = [entrypoint.split(";")[1].split(), manifest(*words)[1]["spec"]["entrypoint"].split(), command_line(*words)]
    for line in lines:
        assert line[:20] == ["python", "-P", "-m", "rec_dist", "evaluate", *sent]
        assert {"cluster.num_workers=16", "cluster.address=null", "cluster.launcher=ray"} < set(line[18:])


def test_the_words_of_an_evaluation_are_what_the_run_takes(tmp_path: Path) -> None:
    from rec_dist.config.load import load_config

    words = command_line("submit.command=evaluate", "evaluate.num_candidates=all", "cluster.use_gpu=true")
    config = load_config(CONFIG, words[6:])
    assert (config.evaluate.num_candidates, config.cluster.use_gpu, config.evaluate.max_users) == ("all", True, None)
    whole = load_config(CONFIG, ["evaluate.num_candidates=all", "cluster.use_gpu=true"])
    assert (config.evaluate, config.cluster) == (whole.evaluate, whole.cluster)


def test_the_evaluation_of_the_base_model_has_a_value_of_its_own() -> None:
    assert command_line("submit.command=evaluate_base") == [
        *("python", "-P", "-m", "rec_dist", "evaluate"),
        "/shared/runs/SDPO_8b-slurm/7/attempt-0/config.yaml",
    ]


def test_a_rayjob_has_the_time_in_its_name_and_the_command() -> None:
    names = [
        manifest("submit.kuberay.job_name=null", f"submit.command={command}") for command in ("train", "evaluate", "prepare")
    ]
    for (config_map, ray_job), start in zip(names, ("sdpo-8b", "sdpo-8b-evaluate", "sdpo-8b-prepare"), strict=True):
        name = ray_job["metadata"]["name"]
        assert re.fullmatch(rf"rec-dist-{start}-\d{{8}}-\d{{6}}", name)
        assert config_map["metadata"]["name"] == name
        assert abs(time.mktime(time.strptime(name[-15:], "%Y%m%d-%H%M%S")) - time.time()) < 60
    long = manifest("submit.kuberay.job_name=null", "submit.command=evaluate", f"submit.name={'a-long-name-' * 9}")[1][
        "metadata"
    ]["name"]
    assert re.fullmatch(r"a-long-name-a-long-nam-evaluate-\d{8}-\d{6}", long)
    assert len(long) == 47


def test_credentials_and_grace_reach_every_pod() -> None:
    for pod in pods_of(manifest(*CREDENTIALS, "checkpoint.grace_seconds=99.5")[1]):
        assert pod["serviceAccountName"] == "trainer"
        assert pod["containers"][0]["envFrom"] == [{"secretRef": {"name": "s3"}}]
        assert pod["terminationGracePeriodSeconds"] == 130
    for pod in pods_of(manifest()[1]):
        assert "serviceAccountName" not in pod
        assert "envFrom" not in pod["containers"][0]


@pytest.fixture
def kubectl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of this name that records what it gets, in the files `words` and `manifest` of the folder that is returned."""
    tool = tmp_path / "kubectl"
    tool.write_text(f'#!/bin/bash\nprintf "%s\\n" "$@" > {tmp_path}/words\ncat > {tmp_path}/manifest\n', encoding="utf-8")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    return tmp_path


def test_a_manifest_is_created_with_its_hint(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(CONFIG), "--to", "kuberay", "submit.kuberay.namespace=ml", "submit.kuberay.job_name=null"]) == 0
    assert (kubectl / "words").read_text().split() == ["-n", "ml", "create", "-f", "-"]
    name = list(yaml.safe_load_all((kubectl / "manifest").read_text()))[1]["metadata"]["name"]
    err = capsys.readouterr().err
    assert f"kubectl -n ml logs -f job/{name}" in err
    assert f"kubectl -n ml get rayjob {name}" in err


def test_a_service_keeps_its_name_and_is_applied(kubectl: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """So that a changed one takes the place of the one that serves."""
    assert main(["submit", str(CONFIG), "--to", "kuberay", *SERVE, "submit.kuberay.job_name=null"]) == 0
    assert (kubectl / "words").read_text().split() == ["-n", "default", "apply", "-f", "-"]
    name = yaml.safe_load((kubectl / "manifest").read_text())["metadata"]["name"]
    assert name == "rec-dist-sdpo-8b-serve"
    assert f"port-forward service/{name}-serve-svc 8000" in capsys.readouterr().err


def serve_config(*overrides: str) -> Any:
    """What a RayService hands to Ray Serve."""
    return yaml.safe_load(service(*overrides)["spec"]["serveConfigV2"])


@pytest.mark.parametrize(
    ("overrides", "replicas", "actor"),
    [
        ((), 16, {"num_cpus": 12, "num_gpus": 1}),
        (("cluster.num_workers=4",), 4, {"num_cpus": 48, "num_gpus": 1}),
        (("submit.kuberay.gpus_per_worker=0", "cluster.num_workers=auto"), 2, {"num_cpus": 96, "num_gpus": 0}),
        (("cluster.use_gpu=false", "cluster.num_workers=3"), 3, {"num_cpus": 48, "num_gpus": 0}),
        (("cluster.cpus_per_worker=2", "cluster.launcher=local"), 16, {"num_cpus": 2.0, "num_gpus": 1}),
    ],
)
def test_replicas_are_workers_and_fit_into_the_pods(overrides: tuple[str, ...], replicas: int, actor: dict[str, float]) -> None:
    (application,) = serve_config(*overrides)["applications"]
    (server,) = application["deployments"]
    assert (server["num_replicas"], server["ray_actor_options"]) == (replicas, actor)
    used = f"cluster.use_gpu={'true' if actor['num_gpus'] else 'false'}"
    assert {"cluster.launcher=local", used} < set(application["args"]["overrides"])


def test_the_run_its_changes_and_the_options_reach_the_replicas() -> None:
    words = ("evaluate.title_prior=0.5", "model.attention=sdpa", "submit.serve.queue=9", "submit.serve.deadline_seconds=2")
    ray_service = service(*words, "train.run_dir=runs/current")
    config = yaml.safe_load(ray_service["spec"]["serveConfigV2"])
    arguments = config["applications"][0]["args"]
    assert arguments["run"] == "/shared/runs/current"
    assert arguments["options"] == {"queue": 9, "deadline_seconds": 2.0, "prompt_cache_mib": None}
    given = {"data.path=/shared/data/ml-1m", "model.dtype=bfloat16", "model.attention=sdpa", "evaluate.title_prior=0.5"}
    assert given < set(arguments["overrides"])
    assert config["http_options"]["request_timeout_s"] > 2
    assert ray_service["spec"]["rayClusterDeletionDelaySeconds"] > 2
    for pod in (
        ray_service["spec"]["rayClusterConfig"]["headGroupSpec"],
        *ray_service["spec"]["rayClusterConfig"]["workerGroupSpecs"],
    ):
        assert pod["template"]["spec"]["terminationGracePeriodSeconds"] > 2


def test_the_token_of_callers_comes_from_a_secret_and_reaches_the_workers_alone() -> None:
    from rec_dist.commands.serve import TOKEN_VARIABLE

    cluster = service()["spec"]["rayClusterConfig"]
    head, worker = (
        {entry["name"]: entry for entry in group["template"]["spec"]["containers"][0]["env"]}
        for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])
    )
    assert TOKEN_VARIABLE not in head
    assert worker[TOKEN_VARIABLE] == {
        "name": TOKEN_VARIABLE,
        "valueFrom": {"secretKeyRef": {"name": "serve-token", "key": TOKEN_VARIABLE}},
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of Ray Serve, when it is imported here
def test_ray_serve_knows_every_field_of_its_configuration() -> None:
    """Its schemas ignore unknown fields, so what it has read is compared with what was written."""
    from ray.serve.schema import ServeDeploySchema

    for overrides in ((), ("cluster.use_gpu=false", "cluster.num_workers=auto")):
        config = serve_config(*overrides)
        assert ServeDeploySchema.model_validate(config).model_dump(exclude_unset=True) == config


def test_the_import_path_is_a_builder_that_takes_the_arguments() -> None:
    from rec_dist.commands import serve_application

    (application,) = serve_config()["applications"]
    module, _, name = application["import_path"].partition(":")
    assert getattr(serve_application, name).__module__ == module
    assert serve_application.ServedRun.model_validate(application["args"]).run == "/shared/runs/SDPO_8b"


@pytest.mark.parametrize(
    ("limit", "seconds"),
    [("45", 2700), ("45:30", 2730), ("1:02:03", 3723), ("2-3", 183600), ("2-3:04", 183840), ("2-03:04:05", 183845)],
)
def test_every_form_of_a_time_is_read_as_slurm_does(limit: str, seconds: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Tests the longest grace that fits: 30 s are added for shutdown, and 60 s because SLURM may signal early."""
    words = ["submit", str(CONFIG), "--to", "slurm", "--dry-run", f'submit.slurm.time="{limit}"']
    assert main([*words, f"checkpoint.grace_seconds={seconds - 91}"]) == 0
    assert f"#SBATCH --time={limit}\n" in capsys.readouterr().out
    assert main([*words, f"checkpoint.grace_seconds={seconds - 90}"]) == 2
    assert f"is {seconds} s" in capsys.readouterr().err


def test_what_saves_nothing_is_not_asked_to_stop_and_may_be_short() -> None:
    for command in ("prepare", "evaluate", "evaluate_base", "profile"):
        words = [f"submit.command={command}", 'submit.slurm.time="1"']
        assert shell(rendered("slurm", *words), 'echo "<$run_dir>"') == ["<>"]
    assert shell(rendered("slurm"), 'echo "<$run_dir>"') == ["</shared/runs/SDPO_8b>"]


@pytest.mark.parametrize("limit", ["", "1-", "1:2:3:4", "-5", "1-2-3", "5m", " 5", "1-00:00:00:00"])
def test_what_is_no_time_is_refused(limit: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["submit", str(CONFIG), "--to", "slurm", "--dry-run", f'submit.slurm.time="{limit}"']) == 2
    assert f"submit.slurm.time ({limit})" in capsys.readouterr().err


@pytest.mark.parametrize("words", ["END_OF_CONFIG", "$(touch x)", "`touch x`", "it's", "{{ x }} {# y", "\u2028  \x85", "{% raw"])
def test_the_configuration_reaches_the_run_as_it_is_whatever_it_holds(
    words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    instruction = f"one\nEND_OF_CONFIG\n{words}"
    override = f"prompt.instruction={json.dumps(instruction)}"
    script = rendered("slurm", override)
    monkeypatch.chdir(tmp_path)
    configs = ["\n".join(shell(script, 'printf "%s\\n" "$config"')), manifest(override)[0]["data"]["config.yaml"]]
    for config in configs:
        assert yaml.safe_load(config)["prompt"]["instruction"] == instruction
    assert list(tmp_path.iterdir()) == []


def test_a_path_reaches_the_service_as_it_is_whatever_it_holds() -> None:
    name = "it's {{ x }} # \u2028 \x85 \x80 \ufeff : END"
    (application,) = serve_config(f"train.run_dir={json.dumps(f'/shared/{name}')}")["applications"]
    assert application["args"]["run"] == f"/shared/{name}"


def test_names_that_yaml_takes_for_other_values_stay_names() -> None:
    config_map, job = manifest('submit.kuberay.job_name="on"', r'submit.env.NO="\x7f"', 'submit.env.Y="no"')
    assert config_map["metadata"]["name"] == job["metadata"]["name"] == "on"
    (container,) = job["spec"]["rayClusterSpec"]["headGroupSpec"]["template"]["spec"]["containers"]
    assert {"name": "NO", "value": "\x7f"} in container["env"]
    assert "Y" in [variable["name"] for variable in container["env"]]
