"""Configuration: one message names every fault by the key that the user typed, and suggests the key that was meant."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from omegaconf import OmegaConf

from rec_dist.config.compose import load_mapping, runs_of
from rec_dist.config.load import RENAMED, load_config, validate
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.shipped import recipes
from rec_dist.config.yaml_text import to_yaml
from rec_dist.errors import UserError
from rec_dist.methods.sequential.config import DistilConfig, SequentialConfig
from rec_dist.methods.sequential.saved_model import unread_keys
from rec_dist.methods.sequential.task import build_sequential_task

BASE = "data: {source: ml-100k, path: prepared}\ntrain: {run_dir: runs/a}\n"
SHIPPED = [f"{recipe.name}:{run}" for recipe in recipes() for run in runs_of(Path(recipe.name))] + ["preferences"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    file = tmp_path / "run.yaml"
    file.write_text(BASE)
    return file


def fault(path: Path, *overrides: str) -> str:
    with pytest.raises(UserError) as caught:
        load_config(path, overrides)
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("override", "typed", "meant"),
    [
        ("tsak.beta=1", "tsak.beta", "task.beta"),
        ("task.bta=1", "task.bta", "task.beta"),
        ("train.lr=1e-4", "train.lr", "optimizer.lr"),  # right name, wrong section
        ("optimiser.lr=1e-4", "optimiser.lr", "optimizer.lr"),
        ("negatives.number=3", "negatives.number", "negatives.num"),
        ("task.sequential.widht=3", "task.sequential.widht", "task.sequential.width"),
        ("beta=1", "beta", "task.beta"),
    ],
)
def test_an_unknown_key_is_refused_with_the_key_that_was_meant(path: Path, override: str, typed: str, meant: str) -> None:
    assert f"{typed} is no key; did you mean {meant}?" in fault(path, override)


@pytest.mark.parametrize(("old", "new"), RENAMED.items())
def test_a_renamed_key_is_refused_with_its_new_name(path: Path, old: str, new: str) -> None:
    assert f"{old} is no key; it is now called {new}" in fault(path, f"{old}=3")
    section, _, key = new.partition(".")
    assert hasattr(getattr(load_config(path), section), key)


def test_a_renamed_value_is_refused_with_its_new_name(path: Path) -> None:
    message = fault(path, "model.attention=trunkwise")
    assert "model.attention" in message and "'trunkwise'; it is now called per_prompt" in message
    assert load_config(path, ["model.attention=per_prompt"]).model.attention == "per_prompt"


def test_nonsense_gets_no_suggestion(path: Path) -> None:
    message = fault(path, "zzz.qqq=1")
    assert "zzz.qqq is no key" in message
    assert "did you mean" not in message


def test_all_faults_come_in_one_message(tmp_path: Path) -> None:
    file = tmp_path / "bad.yaml"
    file.write_text("data: {source: x}\ntask: {kind: ppo, beta: -1}\noptimizer: {lr: fast}\ntrain: {epoch: 3, run_dir: a}\n")
    message = fault(file)
    assert message.startswith(f"{file}: ")
    for part in ("data.path is missing", "task.kind", "'ppo'", "'sdpo'", "task.beta", "-1", "optimizer.lr", "'fast'"):
        assert part in message, part
    assert "train.epoch is no key; did you mean train.epochs?" in message


def test_a_missing_section_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("task: {kind: sft}\n")
    message = fault(tmp_path / "a.yaml")
    assert "data is missing" in message
    assert "train is missing" in message


def test_the_branches_of_a_union_are_reported_together(path: Path) -> None:
    message = fault(path, "cluster.num_workers=many")
    assert message.count("cluster.num_workers") == 1
    assert "integer" in message
    assert "'auto'" in message
    assert "'many'" in message


@pytest.mark.parametrize(("text", "value"), [("1e-4", 1e-4), ("3", 3.0), ("2.5", 2.5), ("1E3", 1000.0)])
def test_a_number_is_a_float_where_a_float_is_wanted(path: Path, text: str, value: float) -> None:
    found = load_config(path, [f"optimizer.lr={text}", f"data.min_rating={text}"])
    assert isinstance(found.optimizer.lr, float)
    assert found.optimizer.lr == found.data.min_rating == value
    path.write_text(f"{BASE}optimizer: {{lr: {text}}}\n")
    assert load_config(path).optimizer.lr == value


def test_a_number_in_an_environment_variable_is_a_float(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REC_DIST_TEST_LR", "1e-4")
    assert load_config(path, ["optimizer.lr=${oc.env:REC_DIST_TEST_LR}"]).optimizer.lr == 1e-4
    path.write_text(f"{BASE}optimizer: {{lr: '3e-4', betas: ['0.8', 0]}}\n")
    found = load_config(path).optimizer
    assert (found.lr, found.betas) == (3e-4, (0.8, 0.0))


@pytest.mark.parametrize(
    "override", ["train.epochs=1.5", "train.epochs=1e1", "train.epochs='2'", "cluster.use_gpu=1", "optimizer.lr=true"]
)
def test_nothing_else_is_coerced(path: Path, override: str) -> None:
    assert override.split("=")[0] in fault(path, override)


@pytest.mark.parametrize(("override", "got"), [("submit.slurm.time=4:00:00", "14400"), ("submit.slurm.memory_per_node=0", "0")])
def test_text_that_yaml_takes_for_a_number_is_refused_with_the_way_to_write_it(path: Path, override: str, got: str) -> None:
    key, _, text = override.partition("=")
    assert f"got {got}; put text in quotes, on a command line '{key}=\"...\"'" in fault(path, override)
    section = load_config(path, [f'{key}="{text}"']).submit.slurm
    assert getattr(section, key.rpartition(".")[2]) == text


def test_overrides_come_last_and_in_order(path: Path) -> None:
    found = load_config(
        path, ["train.epochs=2", "train.epochs=3", "adapter.target_modules=[q_proj,v_proj]", "data.min_rating=null"]
    )
    assert found.train.epochs == 3
    assert found.adapter.target_modules == ["q_proj", "v_proj"]
    assert found.data.min_rating is None


@pytest.mark.parametrize("override", ["train.epochs", "--epochs=3", "=3", "train.epochs 3", "tränen.x=1"])
def test_a_malformed_override_is_refused(path: Path, override: str) -> None:
    assert "is not section.key=value" in fault(path, override)


def test_an_override_through_a_number_is_refused(path: Path) -> None:
    assert "train.epochs" in fault(path, "train.epochs=2", "train.epochs.x=1")


def test_interpolations_and_environment_variables_are_resolved(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REC_DIST_TEST_SCRATCH", "/scratch/me")
    overrides = ["train.run_dir=${oc.env:REC_DIST_TEST_SCRATCH}/${task.kind}", "task.kind=dpo"]
    assert load_config(path, overrides).train.run_dir == "/scratch/me/dpo"
    monkeypatch.delenv("REC_DIST_TEST_SCRATCH")
    assert "REC_DIST_TEST_SCRATCH" in fault(path, *overrides)
    assert "task.kid" in fault(path, "train.run_dir=${task.kid}")


def test_extends_lies_underneath_and_beside(tmp_path: Path) -> None:
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared" / "base.yaml").write_text(BASE + "task: {kind: dpo, beta: 0.5}\n")
    (tmp_path / "shared" / "middle.yaml").write_text("extends: base.yaml\ntrain: {epochs: 4}\ntask: {beta: 0.25}\n")
    (tmp_path / "top.yaml").write_text("extends: shared/middle.yaml\ntrain: {seed: 9}\n")
    found = load_config(tmp_path / "top.yaml", ["train.seed=10"])
    assert (found.task.kind, found.task.beta, found.train.epochs, found.train.seed) == ("dpo", 0.25, 4, 10)
    assert found.train.run_dir == "runs/a"


def test_a_cycle_of_extends_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("extends: b.yaml\n")
    (tmp_path / "b.yaml").write_text("extends: a.yaml\n")
    assert "extends itself through a.yaml -> b.yaml" in fault(tmp_path / "a.yaml")


@pytest.mark.parametrize(
    ("text", "part"),
    [("[1, 2]", "no mapping"), ("a: [1", "not readable YAML"), ("3", "YAML|mapping"), ("extends: no.yaml", "no.yaml")],
)
def test_an_unreadable_file_is_named(tmp_path: Path, text: str, part: str) -> None:
    (tmp_path / "a.yaml").write_text(text)
    with pytest.raises(UserError, match=part):
        load_config(tmp_path / "a.yaml")


def test_a_file_that_does_not_exist_is_named(tmp_path: Path) -> None:
    assert str(tmp_path / "a.yaml") in fault(tmp_path / "a.yaml")


def test_the_resolved_configuration_reads_back_as_itself(path: Path) -> None:
    found = load_config(path, ["optimizer.lr=1e-7", "cluster.num_workers=3", "evaluate.num_candidates=all"])
    again = path.with_name("again.yaml")
    again.write_text(to_yaml(found))
    assert load_config(again) == found
    assert validate(load_mapping(again), RunConfig, "again") == found
    assert OmegaConf.load(again).optimizer.lr == 1e-7


@pytest.mark.parametrize("name", SHIPPED)
def test_every_run_that_we_ship_loads_and_has_no_key_without_effect(name: str) -> None:
    config = load_config(name)
    assert config.train.run_dir
    assert config.task.kind != "sequential" or unread_keys(config) == []


def test_runs_of_language_models_and_recommenders_are_shipped() -> None:
    kinds = [load_config(name).task.kind for name in SHIPPED]
    assert kinds.count("sequential") >= 6
    assert {"sft", "sdpo", "dmpo", "delrec_distill", "delrec", "p2rec_reconstruct"} <= set(kinds)


@pytest.mark.parametrize(
    "override", ["cluster.zero_stage=true", "cluster.zero_stage=4", "cluster.cpus_per_worker=-1", "cluster.cpus_per_worker=0"]
)
def test_what_the_cluster_cannot_be(path: Path, override: str) -> None:
    """In Python true equals 1, and a cluster without requirements would have accepted a negative number of CPUs."""
    key, _, value = override.partition("=")
    message = fault(path, override)
    assert key in message and value in message


def test_keys_of_a_language_model_are_named_under_a_recommender(path: Path, tmp_path: Path) -> None:
    words = (
        "negatives.num=9",
        "adapter.rank=64",
        "model.path=mine",
        "prompt.max_history=3",
        "task.beta=0.5",
        "task.delrec.top_h=4",
    )
    config = load_config(path, ["task.kind=sequential", "adapter.kind=none", "task.sequential.width=8", *words])
    named = sorted(word.split("=")[0] for word in words)
    assert sorted(unread_keys(config)) == named
    (tmp_path / "again.yaml").write_text(to_yaml(pinned(config)))  # as a run directory keeps it: every key is set
    assert sorted(unread_keys(load_config(tmp_path / "again.yaml"))) == named
    assert unread_keys(load_config(path, ["task.kind=sequential"])) == []


def test_the_run_says_it_in_one_line(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """tiny_config belongs to a language model; only keys that differ from their defaults are named."""
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", "task.kind=sequential"))
    notes = [note for note in build_sequential_task(config).notes() if "no effect" in note]
    assert len(notes) == 1 and notes[0].startswith("WARNING: task.kind=sequential trains no language model")
    assert {"adapter.rank", "model.path", "prompt.instruction"} <= set(notes[0].partition("no effect: ")[2].split(", "))
    assert not {"negatives.num", "task.beta", "adapter.kind"} & set(notes[0].partition("no effect: ")[2].split(", "))


def test_a_configuration_that_holds_itself_is_refused_in_one_line(tmp_path: Path) -> None:
    """A mapping of Python, and one of YAML's anchors."""
    value: dict[str, Any] = {"data": {"path": "/d"}, "train": {"run_dir": "r"}}
    value["data"]["columns"] = value
    with pytest.raises(UserError, match=r"holds itself.*write that entry out") as caught:
        load_config(value)
    assert len(str(caught.value).splitlines()) == 1
    (tmp_path / "run.yaml").write_text("data: &own\n  path: /d\n  columns: *own\ntrain: {run_dir: r}\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"run\.yaml"):
        load_config(tmp_path / "run.yaml")


def test_a_path_in_a_section_of_a_section_leaves_its_other_keys_in_a_key() -> None:
    """Results do not depend on where a teacher's lists lie, but on the weight that they have."""
    one = SequentialConfig(distil=DistilConfig(lists="here", weight=0.3))
    for other, same in ((DistilConfig(lists="there", weight=0.3), True), (DistilConfig(lists="here", weight=0.4), False)):
        assert (SequentialConfig(distil=other).without_paths() == one.without_paths()) is same
    assert "lists" not in one.without_paths()["distil"]
