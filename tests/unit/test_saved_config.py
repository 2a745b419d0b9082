"""Configurations that are written down, in a run directory or for a cluster: read back as they were, with nothing resolved."""

import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ValidationError

from rec_dist.commands.target import finished_run
from rec_dist.config.compose import load_mapping
from rec_dist.config.load import load_config, load_saved
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import escaped, to_word, to_yaml, unescaped
from rec_dist.errors import UserError
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.submit import kuberay, slurm
from rec_dist.submit.job import build_job

BASE: dict[str, Any] = {
    "data": {"source": "ml-100k", "path": "/shared/prepared"},
    "train": {"run_dir": "/shared/runs/a"},
    "submit": {
        "storage": "/shared",
        "slurm": {"nodes": 1, "gpus_per_node": 1, "time": "1:00:00"},
        "kuberay": {"image": "i", "workers": 1, "gpus_per_worker": 1, "job_name": "a"},
    },
}
TEXT = st.one_of(
    st.text(alphabet=st.characters(codec="utf-8"), max_size=30),
    st.lists(
        st.sampled_from(["${", "}", "\\", "$", "{", "oc.env:HOME", "'", '"', "\n", " ", "#", ":", "-", "\x1b", "\x85"]),
        max_size=9,
    ).map("".join),
    st.sampled_from(
        [
            "1e3",
            "0x1F",
            "1_0",
            ".5",
            "12:30",
            "null",
            "~",
            "yes",
            "<<",
            "=",
            "2020-01-01",
            "|",
            "- a",
            "\n",
            "\n x\n",
            "END_OF_CONFIG",
        ]
    ),
)
SAVE, SAVE_MANY = (
    settings(max_examples=number, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
    for number in (20, 200)
)


def text_keys(model: type[BaseModel], above: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    """Every key that may hold text; of a mapping, the entry `user`."""
    for name, field in model.model_fields.items():
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            yield from text_keys(field.annotation, (*above, name))
        elif field.annotation == dict[str, str]:
            yield (*above, name, "user")
        elif "str" in str(field.annotation):
            yield (*above, name)


KEYS = sorted(text_keys(RunConfig))


def with_text(key: tuple[str, ...], text: str) -> RunConfig:
    """The configuration with `text` at `key`. Rejects the example if the key does not take it."""
    value: dict[str, Any] = yaml.safe_load(yaml.safe_dump(BASE))
    at = value
    for part in key[:-1]:
        at = at.setdefault(part, {})
    at[key[-1]] = text
    try:
        return load_config(RunConfig.model_validate(value))
    except (ValidationError, UserError):
        assume(False)
        raise


def sent(config: RunConfig, folder: Path) -> Iterator[tuple[str, RunConfig, RunConfig]]:
    """(scheduler, the configuration of the job, the same as the cluster reads it from what was sent)."""
    try:
        job = build_job(config, local_paths=False)
        script, manifest = slurm.script_of(job), kuberay.manifest(job, "a")
    except UserError:  # a path that means nothing on a cluster
        assume(False)
        raise
    end = next(word for word in ("END_OF_CONFIG" + "_" * n for n in range(9)) if f"<< '{word}'\n" in script)
    texts = {
        "ray": job.config_text,
        "slurm": script.partition(f"<< '{end}'\n")[2].partition(f"\n{end}\n")[0] + "\n",
        "kuberay": next(yaml.safe_load_all(manifest))["data"]["config.yaml"],
    }
    for to, text in texts.items():
        (folder / "sent.yaml").write_text(text, encoding="utf-8", newline="")
        yield to, job.config, load_config(folder / "sent.yaml")


def test_there_are_keys_for_text() -> None:
    names = {".".join(key) for key in KEYS}
    assert {"prompt.instruction", "data.columns.user", "evaluate.output_dir", "cluster.address", "submit.env.user"} <= names


@given(key=st.sampled_from(KEYS), text=TEXT)
@example(key=("prompt", "instruction"), text="It costs ${price}")
@example(key=("prompt", "end"), text="${oc.env:HOME}")
@SAVE
def test_any_text_in_any_key_survives_save_and_load(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    survives_save_and_load(key, text, tmp_path)


@pytest.mark.slow
@given(key=st.sampled_from(KEYS), text=TEXT)
@SAVE_MANY
def test_much_text_survives_save_and_load(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    survives_save_and_load(key, text, tmp_path)


def survives_save_and_load(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    config = with_text(key, text)
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config), encoding="utf-8", newline="")
    assert load_saved(file) == config
    assert load_config(file) == config, "as a user's file it means the same"
    assert load_saved(file, ["train.seed=7"]).train.seed == 7


SENT_KEYS = [key for key in KEYS if key[0] not in ("submit", "plan")]


@given(key=st.sampled_from(SENT_KEYS), text=TEXT)
@example(key=("prompt", "instruction"), text="It costs ${price}")
@example(key=("prompt", "end"), text="\u2028${oc.env:HOME}\r\n")
@SAVE
def test_any_text_in_any_key_survives_submit(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    survives_submit(key, text, tmp_path)


@pytest.mark.slow
@given(key=st.sampled_from(SENT_KEYS), text=TEXT)
@SAVE_MANY
def test_much_text_survives_submit(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    survives_submit(key, text, tmp_path)


def survives_submit(key: tuple[str, ...], text: str, tmp_path: Path) -> None:
    for to, config, received in sent(with_text(key, text), tmp_path):
        assert received == config, to


@given(text=TEXT)
@example(text="${oc.env:HOME}")
@SAVE
def test_any_text_survives_as_an_override(text: str) -> None:
    """submit.command=evaluate passes our keys as words of a command line."""
    word = shlex.split(shlex.quote(f"evaluate.output_dir={to_word(text)}"))[0]
    assert load_mapping(BASE, [word])["evaluate"]["output_dir"] == text


@given(text=TEXT)
@SAVE
def test_escaping_is_undone(text: str) -> None:
    assert unescaped(escaped(text)) == text


def saved_run(folder: Path, *lines: str) -> Path:
    """A finished run directory with a config.yaml that somebody wrote by hand."""
    run = RunDirectory(folder)
    run.model.mkdir(parents=True)
    (run.model / "adapter_model.safetensors").write_bytes(b"weights")
    run.finish({"step": 1})
    run.config_path.write_text("\n".join(["train: {run_dir: /r}", *lines]) + "\n", encoding="utf-8")
    return folder


def test_a_run_directory_of_others_reads_no_environment(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REC_DIST_TEST_TOKEN", "swordfish")
    line = "data: {path: 's3://evil/${oc.env:REC_DIST_TEST_TOKEN}', source: '${train.run_dir}'}"
    with pytest.raises(UserError, match=r"data.path \(s3://evil/\$\{oc.env:\w+\}\) came from the environment.*give data.path="):
        finished_run(saved_run(tmp_path / "run", line), [])
    own, _ = finished_run(tmp_path / "run", ["data.path=/x/${oc.env:REC_DIST_TEST_TOKEN}"])
    assert own.data.path == "/x/swordfish", "an override is the user's own"
    assert own.data.source == "${train.run_dir}"


@pytest.mark.parametrize("section", ["extends: other.yaml", "runs: {a: {}}", "vars: {a: b}", "pipeline: {}"])
def test_a_run_directory_of_others_reads_no_other_file(section: str, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "other.yaml").write_text("data: {path: ${oc.env:HOME}}\n")
    with pytest.raises(UserError, match=rf"config.yaml: .*{section.partition(':')[0]}\S* is no key"):
        finished_run(saved_run(tmp_path / "run", "data: {path: /d}", section), [])


def test_a_price_in_a_prompt_is_evaluated_with_the_prompt_that_was_trained(tmp_path: Path) -> None:
    """What the user writes as \\${price} is saved, and read back, as ${price}."""
    file = tmp_path / "run.yaml"
    file.write_text("data: {path: /d}\ntrain: {run_dir: runs/a}\nprompt: {instruction: 'For \\${price} or less'}\n")
    config = pinned(load_config(file))
    assert config.prompt.instruction == "For ${price} or less"
    run = RunDirectory(tmp_path / "run")
    run.claim(config.model_dump(mode="json"), to_yaml(config))
    assert load_saved(run.config_path) == config
