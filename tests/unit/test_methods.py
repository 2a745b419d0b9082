"""The registry of methods: every built-in one is complete; one from outside is found, checked and configured in the same way."""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from outside_method import write_entry_point, write_package

import rec_dist
from rec_dist.config import method_table
from rec_dist.config.load import load_config
from rec_dist.config.method_table import BUILT_IN, built_in_sections
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig, schema_for
from rec_dist.config.section import Section
from rec_dist.config.yaml_text import to_yaml
from rec_dist.errors import UserError
from rec_dist.methods.method import missing_members
from rec_dist.methods.registry import build_task, check_workers_find, find_initial_weights, get_method, method_of, register_method

Make = Callable[..., dict[str, Any]]
PLUGIN = ("task.kind=hinge", "task.plugin=hinge_method:HINGE")


@pytest.fixture(autouse=True)
def unregistered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing that a test registers or imports is left afterwards."""
    monkeypatch.setattr(method_table, "_registered", {})
    monkeypatch.delitem(sys.modules, "hinge_method", raising=False)


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = write_package(tmp_path / "package")
    monkeypatch.syspath_prepend(folder)
    return folder


@pytest.fixture
def file(tmp_path: Path, tiny_config: Make) -> Path:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path / "run")), encoding="utf-8")
    return path


@pytest.mark.parametrize("kind", BUILT_IN)
def test_a_built_in_method_is_whole_and_has_the_section_of_the_table(kind: str) -> None:
    method = get_method(kind)
    assert method.name == kind and missing_members(method) == []
    entry = BUILT_IN[kind].section
    assert method.section == (None if entry is None else (entry[0], built_in_sections()[entry[0]]))


def test_a_plugin_has_its_section_in_the_configuration(file: Path, package: Path, tmp_path: Path) -> None:
    config = load_config(file, [*PLUGIN, "task.hinge.margin=2"])
    method = method_of(config)
    assert method.section is not None
    section = config.task.section(method.section[1])
    assert section.model_dump() == {"margin": 2.0, "popularity": 0.0, "notes": None}
    again = tmp_path / "again.yaml"
    again.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(again) == config
    assert RunConfig.model_validate(config.model_dump()).task == config.task  # what a worker does
    assert schema_for({"task": {"kind": "hinge", "plugin": "hinge_method:HINGE"}}).model_fields["task"].annotation is type(
        config.task
    )


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("task.hinge.margn=2", ("task.hinge.margn", "did you mean task.hinge.margin?")),
        ("task.hinge.margin=0", ("task.hinge.margin", "greater than 0")),
        ("task.hinge.margin=high", ("task.hinge.margin", "'high'")),
        ("task.kind=sft", ("task.kind", "is the method hinge", "set task.kind=hinge")),
    ],
)
def test_faults_in_the_section_of_a_plugin_come_with_those_of_others(
    file: Path, package: Path, override: str, words: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as fault:
        load_config(file, [*PLUGIN, override, "optimizer.lr=-1"])
    assert all(word in str(fault.value) for word in (*words, "optimizer.lr"))


@pytest.mark.parametrize(
    ("plugin", "word"),
    [
        ("hinge_method", "module:object"),
        ("nowhere_method:HINGE", "cannot be imported"),
        ("hinge_method:DPO", "cannot be imported"),
        ("hinge_method:Hinge", "name an instance"),
        ("json:dumps", "is no method"),
        ("./hinge_method:HINGE", "cannot be imported"),
        ("faulty_method:HINGE", "RuntimeError: too old"),
    ],
)
def test_a_plugin_that_is_none(file: Path, package: Path, plugin: str, word: str) -> None:
    (package / "faulty_method.py").write_text("raise RuntimeError('too old')", encoding="utf-8")
    with pytest.raises(UserError) as fault:
        load_config(file, ["task.kind=hinge", f"task.plugin={plugin}"])
    assert "task.plugin" in str(fault.value) and word in str(fault.value)


def test_an_unknown_kind_lists_the_known_ones_and_the_closest(file: Path) -> None:
    with pytest.raises(UserError) as fault:
        load_config(file, ["task.kind=squential", "task.beta=-1"])
    words = ("task.kind", "did you mean 'sequential'?", "'dmpo'", "task.plugin=module:object", "got 'squential'", "task.beta")
    assert all(word in str(fault.value) for word in words)
    assert "is no key" not in str(fault.value)


def test_an_entry_point_is_found_by_its_name(file: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"task\.kind"):
        load_config(file, ["task.kind=hinge"])
    monkeypatch.syspath_prepend(write_entry_point(tmp_path / "installed"))
    config = load_config(file, ["task.kind=hinge", "task.hinge.margin=3"])
    check_workers_find(load_config(file, ["task.kind=hinge", "cluster.launcher=ray"]))
    assert method_of(config).name == "hinge"


@pytest.mark.parametrize("entry", ["hinge = hinge_method:NOTHING", "hinge = nowhere_method:HINGE", "other = hinge_method:HINGE"])
def test_a_broken_entry_point_names_its_package(
    file: Path, package: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, entry: str
) -> None:
    monkeypatch.syspath_prepend(write_entry_point(tmp_path / "installed", entry))
    with pytest.raises(UserError) as fault:
        load_config(file, [f"task.kind={entry.split()[0]}"])
    assert "task.kind" in str(fault.value) and "hinge-method" in str(fault.value)


def test_a_registered_method_trains_in_this_process_only(file: Path, package: Path) -> None:
    from hinge_method import HINGE

    rec_dist.register_method(HINGE)
    config = load_config(file, ["task.kind=hinge"])
    check_workers_find(config)
    task = build_task(config, find_initial_weights(config), "cpu")
    assert (task.name, task.reference, task.model.metric_names) == ("hinge", None, ("hinge/violations",))
    with pytest.raises(UserError, match=r"task\.plugin=module:object"):
        check_workers_find(load_config(file, ["task.kind=hinge", "cluster.launcher=ray"]))


def test_the_paths_of_a_section_become_absolute(file: Path, package: Path) -> None:
    notes = pinned(load_config(file, [*PLUGIN, "task.hinge.notes=here.txt"])).model_dump()["task"]["hinge"]["notes"]
    assert notes == str(Path("here.txt").absolute())
    assert pinned(load_config(file, [*PLUGIN, "task.hinge.notes=none"])).model_dump()["task"]["hinge"]["notes"] == "none"
    with pytest.raises(UserError, match=r"task\.hinge\.notes"):
        pinned(load_config(file, [*PLUGIN, "task.hinge.notes=s3://bucket/notes"]))


class _Keys(Section):
    rate: float


class _Method:
    """A method with only a name and a section."""

    def __init__(self, name: str, section: Any = None) -> None:
        self.name, self.section = name, section
        self.ranker = self.initial_weights = self.build = self.plan = None


@pytest.mark.parametrize(
    ("method", "word"),
    [
        (_Method("sdpo"), "is built in"),
        (_Method("not a name"), "identifier"),
        (_Method, "_Method is a class"),
        (_Method("mine", ("delrec", _Keys)), "another name"),
        (_Method("mine", ("section", _Keys)), "another name"),
        (_Method("mine", ("model_dump", _Keys)), "another name"),
        (_Method("mine", ("my keys", _Keys)), "an identifier"),
        (_Method("mine", "mine"), "give a tuple"),
        (_Method("mine", ("beta", _Keys)), "another name"),
        (_Method("mine", ("mine", dict)), "Section"),
    ],
)
def test_what_cannot_be_registered(method: Any, word: str) -> None:
    with pytest.raises(UserError, match=word):
        register_method(method)


def test_a_method_without_all_members_names_what_it_lacks() -> None:
    method = _Method("mine")
    del method.plan, method.ranker
    with pytest.raises(UserError, match="mine lacks ranker, plan"):
        register_method(method)  # type: ignore[arg-type]


def test_the_second_of_a_name_replaces_the_first_and_a_key_without_default_must_be_given(file: Path) -> None:
    register_method(_Method("mine"))  # type: ignore[arg-type]
    register_method(_Method("mine", ("mine", _Keys)))  # type: ignore[arg-type]
    assert load_config(file, ["task.kind=mine", "task.mine.rate=2"]).task.section(_Keys).rate == 2.0
    with pytest.raises(UserError, match=r"task\.mine"):
        load_config(file, ["task.kind=mine"])
