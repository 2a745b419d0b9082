"""Recipes: what a file extends, runs by name, the matrix of a pipeline, and the commands that list and copy recipes."""

import re
from pathlib import Path

import pytest

from rec_dist.cli import main
from rec_dist.config.compose import load_mapping, load_unresolved, runs_of
from rec_dist.config.load import load_config
from rec_dist.config.pipeline import load_pipeline
from rec_dist.config.shipped import configs_dir, recipes, shipped_file
from rec_dist.errors import UserError

BASE = "data: {source: ml-100k, path: prepared}\ntrain: {run_dir: runs/a}\n"
NAMES = [recipe.name for recipe in recipes()]
PIPELINE = """\
vars: {method: sdpo}
matrix: {k: [1, 3], start: [cold, warm]}
runs:
  shared: {extends: base.yaml, task: {beta: 0.5}}
  sft: {extends: [shared, method/sft], train: {run_dir: runs/sft}}
  sdpo: {extends: [shared, "method/${method}"], train: {run_dir: "runs/k${negatives.num}-${vars.method}"}}
pipeline:
  title: "${vars.method}, twice"
  run_dir: runs/report
  stages:
    - {name: prepare, do: prepare, target: sft}
    - name: "train ${matrix.k} ${matrix.start}"
      do: train
      target: "${vars.method}"
      set: ["negatives.num=${matrix.k}", "task.beta=2"]
    - {name: "K=${matrix.k}", do: evaluate, target: "runs/k${matrix.k}"}
    - {name: base, do: evaluate, target: sft}
  pairs:
    - ["K=${matrix.k}", base]
"""


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    (tmp_path / "base.yaml").write_text(BASE.splitlines()[0], encoding="utf-8")
    path = tmp_path / "all.yaml"
    path.write_text(PIPELINE.replace("method/${method}", "method/sdpo"), encoding="utf-8")
    return path


def refused(call: object, *words: str) -> None:
    assert callable(call)
    with pytest.raises(UserError) as caught:
        call()
    assert [word for word in words if word not in str(caught.value)] == [], str(caught.value)


def test_a_list_is_merged_from_left_to_right_and_the_file_comes_last(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text(BASE + "task: {kind: dpo, beta: 0.1}\nadapter: {target_modules: [q_proj, k_proj]}\n")
    (tmp_path / "b.yaml").write_text("task: {beta: 0.2}\nadapter: {target_modules: [v_proj]}\ntrain: {seed: 1, epochs: 5}\n")
    (tmp_path / "top.yaml").write_text("extends: [./a.yaml, b.yaml, method/sft]\ntrain: {seed: 2}\n")
    found = load_config(tmp_path / "top.yaml")
    assert (found.task.kind, found.task.beta, found.train.seed, found.train.epochs) == ("sft", 0.2, 2, 5)
    assert found.adapter.target_modules == ["v_proj"]
    assert found.train.targets_per_prompt == 32  # of the shipped group


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("extends: method/sdop", ("method/sdop", "did you mean method/sdpo?", "rec-dist recipes")),
        ("extends: nowhere/x", ("nowhere/x", "rec-dist recipes")),
        ("extends: [method/sft, 3]", ("extends", "3", "a list")),
        ("extends: method/${task.kind}", ("extends", "${task.kind}")),
        ("extends: recipes/quickstart:sftt", ("quickstart.yaml:sftt", "sft, sdpo")),
        ("runs: {a: {extends: b}, b: {extends: a}}", ("a.yaml:a extends itself", "a.yaml:b")),
        ("runs: {a: {extends: 'a.yaml:a'}}", ("a.yaml:a extends itself",)),
        ("extends: 'a.yaml:x'\nruns: {x: {}}", ("a.yaml extends itself",)),
        ("runs: {a: 3}", ("runs.a", "no mapping")),
        ("runs: 3\nvars: 3", ("a.yaml has no `runs`",)),
        ("task: {kind: sft}", ("a.yaml has no `runs`",)),
    ],
)
def test_what_cannot_be_extended(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    (tmp_path / "a.yaml").write_text(text, encoding="utf-8")
    refused(lambda: load_mapping(tmp_path / "a.yaml:a"), *words)


def test_a_run_of_a_file_is_a_configuration(pipeline: Path) -> None:
    found = load_config(f"{pipeline}:sdpo", ["negatives.num=5"])
    assert (found.task.kind, found.task.beta, found.train.run_dir) == ("sdpo", 1.0, "runs/k5-sdpo")
    assert load_config(f"{pipeline}:sdpo", ["vars.method=mine"]).train.run_dir == "runs/k7-mine"
    assert load_config(f"{pipeline}:sft").task.beta == 0.5
    assert runs_of(pipeline) == ["sft", "sdpo"]


def test_a_file_on_top_of_another_changes_single_keys_of_its_runs(pipeline: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "mine.yaml").write_text("extends: ../all.yaml\nruns: {sft: {train: {epochs: 7}}}\n")
    found = load_config(f"{tmp_path}/elsewhere/mine.yaml:sft")
    assert (found.train.epochs, found.train.run_dir, found.data.path) == (7, "runs/sft", "prepared")


def test_a_mapping_extends_shipped_groups() -> None:
    found = load_config({"extends": ["data/ml-100k", "method/sdpo"], "train": {"run_dir": "a"}}, {"negatives.num": 2})
    assert (found.data.source, found.task.kind, found.negatives.num) == ("ml-100k", "sdpo", 2)


def test_a_file_of_runs_says_which_it_has(pipeline: Path) -> None:
    refused(lambda: load_config(pipeline), f"{pipeline}:sft", "runs: sft, sdpo", "`rec-dist run`")
    refused(lambda: load_config("quickstart:nothing"), "quickstart.yaml:nothing", "ensemble, sft, sdpo, dmpo")
    refused(lambda: load_config("quickstrat"), "quickstrat", "did you mean quickstart?", "rec-dist recipes")
    refused(lambda: load_config(f"{pipeline}:sft", ["vars.methd=a"]), "vars.methd=a", "names in `vars` are method")


def test_stages_and_pairs_are_repeated_over_what_they_use_of_the_matrix(pipeline: Path) -> None:
    found = load_pipeline(pipeline)
    assert [stage.name for stage in found.stages] == [
        "prepare",
        "train 1 cold",
        "train 1 warm",
        "train 3 cold",
        "train 3 warm",
        "K=1",
        "K=3",
        "base",
    ]
    assert found.pairs == (["K=1", "base"], ["K=3", "base"])
    assert found.title == "sdpo, twice"
    assert found.stages[3].words == ["train", f"{pipeline}:sdpo", "negatives.num=3", "task.beta=2"]
    assert [stage.target for stage in found.stages[5:]] == ["runs/k1", "runs/k3", f"{pipeline}:sft"]


def test_stages_with_one_row_are_its_repeats_and_points_are_repeated_as_stages_are(pipeline: Path) -> None:
    text = pipeline.read_text(encoding="utf-8").replace(
        '{name: "K=${matrix.k}", do: evaluate, target: "runs/k${matrix.k}"}',
        '{name: "K=${matrix.k} ${matrix.start}", row: "K=${matrix.k}", do: evaluate, target: "runs/k${matrix.k}-${matrix.start}"}',
    )
    pipeline.write_text(text + '  curves: {axis: K, points: [{line: mine, x: "${matrix.k}", row: "K=${matrix.k}"}]}\n')
    found = load_pipeline(pipeline)
    assert {row: [stage.target for stage in stages] for row, stages in found.rows.items()} == {
        "K=1": ["runs/k1-cold", "runs/k1-warm"],
        "K=3": ["runs/k3-cold", "runs/k3-warm"],
        "base": [f"{pipeline}:sft"],
    }
    assert found.curves is not None
    assert [(point.line, point.x, point.row) for point in found.curves.points] == [("mine", 1.0, "K=1"), ("mine", 3.0, "K=3")]
    assert found.pairs == (["K=1", "base"], ["K=3", "base"])  # rows, not stages


def test_overrides_of_vars_runs_and_the_matrix_reach_the_stages(pipeline: Path) -> None:
    found = load_pipeline(pipeline, ["runs.sdpo.train.epochs=2", "vars.method=sdpo", "matrix.k=[4]", "matrix.start=[cold]"])
    assert [stage.name for stage in found.stages] == ["prepare", "train 4 cold", "K=4", "base"]
    assert found.stages[1].set == ("negatives.num=4", "task.beta=2", "train.epochs=2", "vars.method=sdpo")
    assert load_config(found.stages[1].target, found.stages[1].set).train.epochs == 2
    assert found.stages[0].set == ("vars.method=sdpo",)
    refused(lambda: load_pipeline(pipeline, ["runs.sftt.train.epochs=2"]), "runs.sftt", "names in `runs` are shared, sft, sdpo")


def test_an_empty_list_in_the_matrix_leaves_out_what_uses_it(pipeline: Path) -> None:
    found = load_pipeline(pipeline, ["matrix.k=[]"])
    assert [stage.name for stage in found.stages] == ["prepare", "base"]
    assert found.pairs == ()


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("start: [cold, warm]", "start: cold", ("matrix.start",)),
        ("start: [cold, warm]", "start: [cold, warm], unused: [1]", ("matrix.unused", "no stage")),
        ("${matrix.start}", "${matrix.begin}", ("matrix.begin",)),
        ('"train ${matrix.k} ${matrix.start}"', "train", ("pipeline.stages", "train twice")),
        ("do: prepare, target: sft", "do: prepare, target: sftt", ("prepare names sftt", "`runs`")),
        ("matrix: {k: [1, 3], start: [cold, warm]}", "matrix: 3", ("matrix",)),
        ("  sft: {", "  a/b: {", ("'a/b'", "FILE:NAME")),
        ("do: prepare, target: sft", "do: prepare, row: a, target: sft", ("prepare has a key `row`",)),
        ("  pairs:", "  curves: {axis: K, points: [{line: a, x: 1, row: K=2}]}\n  pairs:", ("pipeline.curves names K=2",)),
    ],
)
def test_what_a_pipeline_cannot_be(pipeline: Path, old: str, new: str, words: tuple[str, ...]) -> None:
    text = pipeline.read_text(encoding="utf-8")
    assert old in text
    pipeline.write_text(text.replace(old, new), encoding="utf-8")
    refused(lambda: load_pipeline(pipeline), *words)


@pytest.mark.parametrize("name", NAMES)
def test_a_recipe_begins_with_its_command_and_runs(name: str) -> None:
    recipe = next(recipe for recipe in recipes() if recipe.name == name)
    assert re.match(rf"rec-dist (run|train) {name}( |$)", recipe.command), "the first line is `# COMMAND: DESCRIPTION`"
    assert len(recipe.description) > 20
    if recipe.command.startswith("rec-dist run"):
        stages = load_pipeline(Path(name)).stages
        assert [stage for stage in stages if stage.is_config and not load_config(stage.target, stage.set).train.run_dir] == []


def test_every_group_begins_with_what_it_is() -> None:
    groups = [path for folder in ("data", "model", "method", "cluster") for path in (configs_dir() / folder).glob("*.yaml")]
    assert len(groups) >= 15
    assert [path.name for path in groups if not path.read_text(encoding="utf-8").startswith("# ")] == []


def test_recipes_are_listed_with_one_line_each(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == NAMES
    assert all(len(line.split()) > 5 for line in lines)


@pytest.mark.parametrize("name", [*NAMES, "method/sdpo", "plan/clusters/64x8xh100"])
def test_a_copied_recipe_resolves_as_the_shipped_one(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", name, "mine.yaml"]) == 0
    shipped = configs_dir() / f"{name if '/' in name else f'recipes/{name}'}.yaml"
    assert load_unresolved(Path("mine.yaml")) == load_unresolved(shipped)
    text = Path("mine.yaml").read_text(encoding="utf-8")
    if name in NAMES:
        assert re.match(r"# rec-dist (run|train) mine\.yaml", text)
        assert [load_config(f"mine.yaml:{run}") for run in runs_of(Path("mine.yaml"))] == [
            load_config(f"{name}:{run}") for run in runs_of(Path(name))
        ]
    assert main(["init", name, "mine.yaml"]) == 2
    assert "mine.yaml exists already" in capsys.readouterr().err
    assert Path("mine.yaml").read_text(encoding="utf-8") == text


def test_commands_in_a_copied_recipe_quote_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart", "my own.yaml"]) == 0
    assert Path("my own.yaml").read_text(encoding="utf-8").startswith("# rec-dist run 'my own.yaml': ")


def test_a_report_needs_a_folder(pipeline: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.chdir(pipeline.parent)
    before = sorted(Path().iterdir())
    assert main(["run", str(pipeline), "pipeline.run_dir=''"]) == 2
    assert "pipeline.run_dir is empty" in capsys.readouterr().err and sorted(Path().iterdir()) == before


def test_init_names_its_file_after_the_recipe(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(["init", "quickstart"]) == 0
    assert Path("quickstart.yaml").is_file()
    assert main(["init", "quickstat", "a.yaml"]) == 2
    assert main(["init", "quickstart", "no/folder.yaml"]) == 2
    said = capsys.readouterr().err
    assert "did you mean quickstart?" in said and "no is no folder" in said


@pytest.mark.parametrize(
    "words",
    [
        ["train", "quickstart:sft", "model.path=~nobody-here/x"],
        ["plan", "llama3-8b:sdpo", "plan.cluster=~nobody-here/x"],
        ["plan", "llama3-8b:sdpo", "plan.model=~nobody-here/x"],
        ["prepare", "quickstart:sft", "data.source=~nobody-here/x"],
    ],
)
def test_the_home_of_nobody_is_the_users_mistake(words: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ~nobody-here/x names the home of a user")


def test_init_says_where_it_cannot_write(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "quickstart", "/proc/quickstart.yaml"]) == 2
    assert capsys.readouterr().err.startswith("error: FILE (/proc/quickstart.yaml) cannot be written")


@pytest.mark.parametrize("recipe", ["quickstart", "delrec"])
def test_rows_of_one_table_rank_the_same_number_of_candidates(recipe: str) -> None:
    pipeline = load_pipeline(shipped_file(recipe))
    configs = {stage.target: stage for stage in pipeline.stages if stage.is_config}
    found = {target: load_config(target, stage.set).evaluate.num_candidates for target, stage in configs.items()}
    assert set(found.values()) == {20}, found
