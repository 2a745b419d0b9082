"""Text of a configuration that comes from the environment: found by whatever way it came, written down as its reference."""

from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.config.load import load_config, load_saved
from rec_dist.config.paths import pinned
from rec_dist.config.pipeline import load_pipeline
from rec_dist.config.references import as_yaml, recorded
from rec_dist.errors import UserError
from rec_dist.submit.job import build_job

BASE: dict[str, Any] = {"data": {"path": "/d"}, "train": {"run_dir": "/r"}}


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REC_DIST_TEST_A", "swordfish")
    monkeypatch.setenv("REC_DIST_TEST_ROOT", "/scratch")
    monkeypatch.setenv("REC_DIST_TEST_LR", "0.5")
    monkeypatch.delenv("REC_DIST_TEST_B", raising=False)


@pytest.mark.parametrize(
    ("text", "resolved", "written"),
    [
        ("${oc.env:REC_DIST_TEST_A}", "swordfish", "${oc.env:REC_DIST_TEST_A}"),
        ("a ${oc.env:REC_DIST_TEST_A} b", "a swordfish b", "a ${oc.env:REC_DIST_TEST_A} b"),
        ("${vars.a}", "swordfish", "${oc.env:REC_DIST_TEST_A}"),
        ("${vars.b}!", "swordfish-2!", "${oc.env:REC_DIST_TEST_A}-2!"),
        (
            "${oc.env:REC_DIST_TEST_B,${oc.env:REC_DIST_TEST_A}}",
            "swordfish",
            "${oc.env:REC_DIST_TEST_B,${oc.env:REC_DIST_TEST_A}}",
        ),
        ("${oc.env:REC_DIST_TEST_A} \\${price}", "swordfish ${price}", "${oc.env:REC_DIST_TEST_A} \\${price}"),
        ("${oc.select:vars.a}", "swordfish", "${oc.env:REC_DIST_TEST_A}"),
        ("${oc.decode:${oc.env:REC_DIST_TEST_A}}", "swordfish", "${oc.decode:${oc.env:REC_DIST_TEST_A}}"),
        ("${oc.decode:plain}", "plain", None),
        ("\\${oc.env:REC_DIST_TEST_A}", "${oc.env:REC_DIST_TEST_A}", None),
        ("${vars.c}", "plain", None),
        ("${vars.${oc.env:REC_DIST_TEST_B,c}}", "plain", None),  # the environment selects a text that stands in the file
    ],
)
def test_text_of_the_environment_is_its_reference(text: str, resolved: str, written: str | None, tmp_path: Path) -> None:
    names = {"a": "${oc.env:REC_DIST_TEST_A}", "b": "${vars.a}-2", "c": "plain"}
    config = pinned(load_config({**BASE, "vars": names, "track": {"project": text}}))
    assert config.track.project == resolved
    assert config.from_environment == ({} if written is None else {("track", "project"): written})
    value, saved = recorded(config)
    assert value["track"]["project"] == (resolved if written is None else written)
    assert (resolved in saved) == (written is None) or "swordfish" not in saved
    (tmp_path / "again.yaml").write_text(saved, encoding="utf-8")
    assert load_config(tmp_path / "again.yaml").track.project == resolved, "where the environment has it"


def test_a_path_below_a_name_is_kept_too() -> None:
    members = {"a": "${oc.env:REC_DIST_TEST_ROOT}/a", "b": "/b"}
    config = pinned(load_config({**BASE, "task": {"kind": "ensemble", "ensemble": {"members": members}}}))
    value, saved = recorded(config)
    assert value["task"]["ensemble"]["members"] == {"a": "/scratch/a", "b": "/b"}
    assert "oc.env" not in saved


def test_paths_and_numbers_are_kept() -> None:
    paths = {"data": {"path": "${oc.env:REC_DIST_TEST_ROOT}/d"}, "optimizer": {"lr": "${oc.env:REC_DIST_TEST_LR}"}}
    value, _ = recorded(pinned(load_config({**BASE, **paths})))
    assert (value["data"]["path"], value["optimizer"]["lr"]) == ("/scratch/d", 0.5)


def test_lists_are_written_as_references() -> None:
    config = load_config({**BASE, "submit": {"slurm": {"setup": ["export A=${oc.env:REC_DIST_TEST_A}", "x"]}}})
    assert config.submit.slurm.setup == ["export A=swordfish", "x"]
    assert "swordfish" not in as_yaml(config)


def test_a_list_that_is_decoded_from_a_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REC_DIST_TEST_LIST", "[swordfish, x]")
    config = load_config({**BASE, "submit": {"slurm": {"setup": "${oc.decode:${oc.env:REC_DIST_TEST_LIST}}"}}})
    assert config.submit.slurm.setup == ["swordfish", "x"]
    assert "setup: ${oc.decode:${oc.env:REC_DIST_TEST_LIST}}" in as_yaml(config)


def test_submit_and_plan_are_not_of_the_run() -> None:
    value, text = recorded(load_config({**BASE, "submit": {"env": {"A": "written"}}}))
    assert not {"submit", "plan"} & value.keys()
    assert "written" not in text


def test_overrides_on_a_configuration_keep_what_it_remembers() -> None:
    config = load_config({**BASE, "track": {"project": "${oc.env:REC_DIST_TEST_A}"}})
    again = load_config(config, ["train.seed=3"])
    assert (again.track.project, again.train.seed) == ("swordfish", 3)
    assert recorded(again)[0]["track"]["project"] == "${oc.env:REC_DIST_TEST_A}"
    other = load_config(config, ["track.project=films"])
    assert recorded(other)[0]["track"]["project"] == "films"


def test_a_saved_configuration_reads_nothing_and_says_what_it_lacks(tmp_path: Path) -> None:
    config = load_config(
        {**BASE, "cluster": {"address": "${oc.env:REC_DIST_TEST_A}"}, "track": {"project": "${oc.env:REC_DIST_TEST_A}"}}
    )
    (tmp_path / "config.yaml").write_text(recorded(config)[1], encoding="utf-8")
    with pytest.raises(UserError, match=r"cluster.address .*came from the environment.*give cluster.address=") as caught:
        load_saved(tmp_path / "config.yaml")
    assert "swordfish" not in str(caught.value)
    loaded = load_saved(tmp_path / "config.yaml", ["cluster.address=null"])
    assert (loaded.cluster.address, loaded.track.project) == (None, "${oc.env:REC_DIST_TEST_A}")


def test_a_command_line_of_a_job_has_references() -> None:
    value = {**BASE, "cluster": {"address": "${oc.env:REC_DIST_TEST_A}"}, "submit": {"command": "evaluate", "storage": "/shared"}}
    words = build_job(load_config(value), local_paths=False).words("")
    assert 'cluster.address="${oc.env:REC_DIST_TEST_A}"' in words
    assert load_config(BASE, [word for word in words if word.startswith("cluster.")]).cluster.address == "swordfish"


def test_stages_have_references_in_their_command_lines(tmp_path: Path) -> None:
    stage = {
        "name": "a",
        "do": "evaluate",
        "target": "run.yaml",
        "set": ["track.project=${vars.a}", "train.run_dir=${vars.root}"],
    }
    names = {"a": "${oc.env:REC_DIST_TEST_A}", "root": "/r"}
    value = {"vars": names, "pipeline": {"title": "t", "run_dir": "${oc.env:REC_DIST_TEST_ROOT}/p", "stages": [stage]}}
    (tmp_path / "pipeline.yaml").write_text(yaml.safe_dump(value), encoding="utf-8")
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(BASE), encoding="utf-8")
    pipeline = load_pipeline(tmp_path / "pipeline.yaml")
    assert pipeline.run_dir == "/scratch/p"
    assert pipeline.stages[0].set == ("track.project=${oc.env:REC_DIST_TEST_A}", "train.run_dir=/r")
