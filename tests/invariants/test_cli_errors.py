"""Every user mistake gives exit code 2 and one line `error: ...` with the cause and the way out, and leaves nothing behind."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from worker_processes import run_command

Make = Callable[..., dict[str, Any]]


class Case:
    """A configuration in a folder of its own, and `rec-dist` in this process."""

    def __init__(self, folder: Path, make: Make, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.run_dir, self.make = folder, folder / "run", make
        self._capsys = capsys
        self.file = self.write(make(self.run_dir))

    def write(self, config: dict[str, Any]) -> Path:
        path = self.folder / "config.yaml"
        path.write_text(yaml.safe_dump(config), encoding="utf-8")
        return path

    def refuses(self, *words: object, names: tuple[str, ...]) -> str:
        """Runs the words; checks the error, and that the folder is unchanged."""
        from rec_dist.cli import main

        before = self.state()
        self._capsys.readouterr()
        code = main([str(word) for word in words])
        printed = self._capsys.readouterr()
        self.check(code, printed.err, names)
        assert printed.out == ""
        assert self.state() == before
        return printed.err

    @staticmethod
    def check(code: int, err: str, names: tuple[str, ...]) -> None:
        lines = err.splitlines()
        assert code == 2, err
        assert [line.startswith("error: ") for line in lines].count(True) == 1
        assert lines[-1].startswith("error: ")
        assert "Traceback" not in err
        assert not [name for name in names if name not in lines[-1]], lines[-1]

    def state(self) -> dict[str, bytes]:
        """Every file and folder with its content."""
        return {str(path): path.read_bytes() if path.is_file() else b"" for path in sorted(self.folder.rglob("*"))}


@pytest.fixture
def case(tmp_path: Path, tiny_config: Make, capsys: pytest.CaptureFixture[str]) -> Case:
    return Case(tmp_path, tiny_config, capsys)


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["tsak.beta=1"], ("tsak.beta is no key", "did you mean task.beta?")),
        (["task.kind=sdop"], ("task.kind", "sdpo", "'sdop'")),
        (["train.max_steps=many"], ("train.max_steps", "integer", "'many'")),
        (["train.seed=true"], ("train.seed", "integer", "True")),
        (["task.beta=-1", "optimizer.lr=x"], ("task.beta", "greater than 0", "optimizer.lr", "'x'")),
        (["cluster.hang_seconds=1e10"], ("cluster.hang_seconds", "less than or equal to 1000000")),
        (["train.max_steps"], ("train.max_steps", "section.key=value")),
        (["model.path=/no/such/model"], ("model.path", "/no/such/model", "give a Hugging Face model folder")),
        (["data.path=nowhere"], ("data.path", "nowhere", "rec-dist prepare")),
        (["train.init_from=nowhere"], ("train.init_from", "nowhere", "let that run finish first")),
        (["task.kind=dpo"], ("task.kind=dpo", "negatives.num is 3", "set negatives.num=1")),
        (["task.kind=sdpo", "negatives.num=0"], ("task.kind=sdpo", "negatives.num is 0", "set negatives.num")),
        (["task.kind=recpo", "negatives.num=0"], ("task.kind=recpo", "negatives.num is 0", "set negatives.num")),
        (["task.kind=recpo", "negatives.kind=low_rated"], ("negatives.kind=low_rated", "task.kind=recpo", "uniform")),
        (["task.kind=mppo", "task.recpo.decay=-1"], ("task.recpo.decay", "greater than or equal to 0")),
        (["task.kind=msl", "task.msl.temperature=0"], ("task.msl.temperature", "greater than 0")),
        (["task.kind=sdpo", "negatives.num=75"], ("negatives.num (75)", "80 items", "lower negatives.num")),
        (
            ["train.max_tokens_per_micro_batch=40"],
            ("train.max_tokens_per_micro_batch (40)", "longest group", "user", "raise it or lower"),
        ),
        (["prompt.max_history=200"], ("positions", "512", "lower prompt.max_history")),
        (["train.targets_per_prompt=3"], ("train.global_batch_size (8)", "multiple of train.targets_per_prompt (3)")),
        (["train.targets_per_prompt=2", "prompt.style=chat"], ("train.targets_per_prompt", "prompt.style=list")),
        (
            ["task.kind=sdpo", "adapter.kind=none", "task.reference=online"],
            ("task.reference=online", "set task.reference=cached"),
        ),
        (["adapter.target_modules=[nothing]"], ("adapter.target_modules", "nothing")),
        (["cluster.num_workers=2"], ("cluster.num_workers (2)", "cluster.launcher=ray")),
        (["cluster.num_workers=0"], ("cluster.num_workers (0)", "1 or more")),
        (["cluster.num_workers=0", "cluster.launcher=ray"], ("cluster.num_workers (0)", "1 or more")),
        (
            ["cluster.num_workers=2", "cluster.min_workers=3", "cluster.launcher=ray"],
            ("cluster.min_workers (3)", "num_workers (2)"),
        ),
        (["cluster.use_gpu=true"], ("cluster.use_gpu", "set cluster.use_gpu=false")),
        (["optimizer.betas=[1,2]"], ("optimizer.betas", "less than 1")),
        (["optimizer.lr=inf"], ("optimizer.lr", "finite")),
        (["train.seed=99999999999999999999999"], ("train.seed", "less than 4294967296")),
        (["prompt.max_history=99999999999999999999"], ("prompt.max_history", "less than 2147483648")),
        (["train.targets_per_prompt=99999999999999999999"], ("train.targets_per_prompt", "less than 2147483648")),
        (["prompt.max_history=2147483647"], ("positions", "512", "lower prompt.max_history")),
        (["data.path=s5://bucket/data"], ("data.path (s5://bucket/data)", "cannot be opened: its scheme is not s3")),
        (["train.run_dir=/dev/null/run"], ("train.run_dir", "choose another folder")),
        (["train.run_dir=s3://bucket/run"], ("train.run_dir (s3://bucket/run)", "is a URI", "give a folder")),
        (["model.attention=flex"], ("model.attention=flex", "needs a CUDA device", "set model.attention=auto or sdpa")),
        (["model.attention=flex", "task.kind=sequential"], ("model.attention=flex", "set it to auto")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_train(case: Case, overrides: list[str], names: tuple[str, ...]) -> None:
    case.refuses("train", case.file, *overrides, names=names)


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["profile.steps=0"], ("profile.steps", "greater than or equal to 1", "0")),
        (["profile.warmup_steps=0"], ("profile.warmup_steps", "greater than or equal to 1")),
        (["profile.steps=99999999999999999999"], ("profile.steps", "less than 1073741824")),
        (["profile.steps=1073741823", "profile.warmup_steps=1073741824"], ("profile.warmup_steps", "less than 1073741824")),
        (["profile.output_dir=/dev/null/x"], ("profile.output_dir (/dev/null/x)", "choose another folder")),
        (["profile.output_dir=s3://bucket/x"], ("profile.output_dir (s3://bucket/x)", "is a URI", "give a folder")),
        (["profile.trace_ranks=[0,1]"], ("profile.trace_ranks", "[1]", "0 to 0")),
        (["profile.memory_snapshot=true"], ("profile.memory_snapshot", "GPU", "set it to false")),
        (["profile.output_dir=${train.run_dir}"], ("profile.output_dir", "train.run_dir", "choose another folder")),
        (["model.attention=flex"], ("model.attention=flex", "needs a CUDA device")),
        (["--against", "no.json"], ("--against", "no.json")),
        (["--tolerance", "-1"], ("--tolerance (-1.0)", "0 or more")),
        (["--tolerance", "much"], ("--tolerance", "much")),
        (["train.max_tokens_per_micro_batch=40"], ("train.max_tokens_per_micro_batch (40)", "longest group")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_profile(case: Case, words: list[str], names: tuple[str, ...]) -> None:
    case.refuses("profile", case.file, *words, names=names)


_REPORT = {"format": 1, "real": {"tokens_per_second": 9.0, "step_seconds": {"p50": 1.0}}, "settings": {"workers": 1}}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "JSONDecodeError"),
        (json.dumps(_REPORT)[:50], "JSONDecodeError"),
        ("[1, 2]", "TypeError"),
        (json.dumps({**_REPORT, "format": 0}), "its format is 0 and this version writes 1"),
        (json.dumps({key: value for key, value in _REPORT.items() if key != "format"}), "KeyError('format')"),
        (json.dumps({key: value for key, value in _REPORT.items() if key != "real"}), "KeyError('real')"),
        (json.dumps({**_REPORT, "settings": []}), "its settings are not an object"),
        (json.dumps({**_REPORT, "real": {"tokens_per_second": 10**400, "step_seconds": {"p50": 1.0}}}), "OverflowError"),
        (json.dumps({**_REPORT, "real": {"tokens_per_second": 0.0, "step_seconds": {"p50": 1.0}}}), "tokens/s and p50"),
        (json.dumps({**_REPORT, "real": {"tokens_per_second": 9.0, "step_seconds": None}}), "TypeError"),
    ],
)
def test_a_file_that_no_profile_can_be_compared_with(case: Case, text: str, says: str) -> None:
    old = case.folder / "old.json"
    old.write_text(text, encoding="utf-8")
    case.refuses("profile", case.file, "--against", old, names=(f"--against ({old})", says, "give one that"))


def test_a_refused_profile_leaves_the_one_before_it(case: Case) -> None:
    """The worker rejects it when the folder has already been claimed."""
    from rec_dist.cli import main

    folder, files = case.folder / "run-profile", {"profile.json": "{}", "trace-rank-0.json": "{}", ".profile": ""}
    folder.mkdir()
    for name, text in files.items():
        (folder / name).write_text(text, encoding="utf-8")
    assert main(["profile", str(case.file), "profile.trace_ranks=[0,1]"]) == 2
    assert {name: (folder / name).read_text(encoding="utf-8") for name in files} == files


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["train.max_tokens_per_micro_batch=8"], ("train.max_tokens_per_micro_batch (8)", "the prompt of", "raise it")),
        (["prompt.candidates=listed"], ("prompt.candidates=listed", "set it to none")),
        (["task.p2rec.pooling=first"], ("task.p2rec.pooling", "last", "mean", "'first'")),
        (["model.path=/no/such/model"], ("model.path", "/no/such/model")),
        (["cluster.num_workers=2"], ("cluster.num_workers (2)", "cluster.launcher=ray")),
        (["prompt.num_virtual=4"], ("prompt.num_virtual (4)", "nothing has trained")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_embed(case: Case, overrides: list[str], names: tuple[str, ...]) -> None:
    case.refuses("embed", case.file, case.folder / "items", *overrides, names=names)


@pytest.mark.parametrize(
    ("words", "key"),
    [
        (["plan", "--json", "{file}"], "--json"),
        (["export-rows", "--out", "{file}", "data.path=nowhere"], "--out"),
        (["embed", "{file}", "data.path=nowhere"], "FOLDER"),
        (["profile", "profile.output_dir={file}", "data.path=nowhere"], "profile.output_dir"),
        (["evaluate", "evaluate.output_dir={file}", "model.path=/no/such/model"], "evaluate.output_dir"),
        (["prepare", "data.path={file}/x", "data.source=nowhere"], "data.path"),
    ],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_a_place_for_results_is_refused_before_anything_is_read(case: Case, words: list[str], key: str) -> None:
    """Each of these has another mistake as well, which is found only when the work begins."""
    case.refuses(
        words[0], case.file, *(word.format(file=case.file) for word in words[1:]), names=(f"{key} ({case.file}", "choose a")
    )


@pytest.mark.parametrize(
    ("words", "key"),
    [(["plan", "--json"], "--json"), (["export-rows", "--out"], "--out"), (["embed"], "FOLDER"), (["export", "--out"], "--out")],
    ids=lambda value: value[0] if isinstance(value, list) else "",
)
def test_results_go_to_no_uri(case: Case, monkeypatch: pytest.MonkeyPatch, words: list[str], key: str) -> None:
    """pathlib reads s3://bucket/x as the folder s3: here."""
    monkeypatch.chdir(case.folder)
    case.refuses(words[0], case.file, *words[1:], "s3://bucket/x", names=(f"{key} (s3://bucket/x) is a URI", "on this machine"))


@pytest.mark.parametrize(
    "words", [["export", "{}", "--out", "served"], ["verify", "{}"], ["embed", "{}", "items"], ["evaluate", "{}"]]
)
def test_a_path_that_is_too_long(case: Case, words: list[str]) -> None:
    case.refuses(*(word.format("x" * 5000) for word in words), names=("xxx", "too long", "give a"))


def test_a_pipeline_that_has_no_place(case: Case) -> None:
    path = case.folder / "pipeline.yaml"
    stage = {"name": "a", "do": "evaluate", "target": "config.yaml"}
    path.write_text(
        yaml.safe_dump({"pipeline": {"title": "T", "run_dir": f"{path}/report", "stages": [stage]}}), encoding="utf-8"
    )
    case.refuses("run", path, names=("pipeline.run_dir", "lies below", "choose another folder"))


def test_embed_keeps_out_of_a_folder_of_other_things(case: Case) -> None:
    (case.folder / "items").mkdir()
    (case.folder / "items" / "thesis.txt").write_text("x", encoding="utf-8")
    case.refuses("embed", case.file, case.folder / "items", names=("items", "not empty", "name another folder"))


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        ([], ("task.kind=p2rec_reconstruct needs task.p2rec.teacher", "task.sequential.top_h")),
        (["task.p2rec.teacher=nowhere"], ("task.p2rec.teacher", "nowhere", "teacher.json", "train it to the end")),
        (["task.p2rec.teacher=random"], ("task.p2rec.teacher", "random", "teacher.json")),
        (["adapter.kind=soft_prompt", "task.p2rec.teacher=nowhere"], ("task.p2rec.teacher",)),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_p2rec_without_a_teacher(case: Case, overrides: list[str], names: tuple[str, ...]) -> None:
    case.refuses("train", case.file, "task.kind=p2rec_reconstruct", *overrides, names=names)


def test_what_has_no_completions_is_not_planned(case: Case) -> None:
    words = ("task.kind=p2rec_reconstruct", "plan.cluster=local-cpu")
    case.refuses(
        "plan", case.file, *words, names=("task.kind=p2rec_reconstruct", "plan it with task.kind=sft", "train.max_steps")
    )


def test_a_recommender_is_no_language_model(case: Case) -> None:
    saved = case.folder / "recommender" / "model"
    saved.mkdir(parents=True)
    (saved / "sequential.json").write_text("{}", encoding="utf-8")
    case.refuses("train", case.file, f"train.init_from={saved.parent}", names=("train.init_from", "holds a recommender"))
    case.refuses("embed", case.file, case.folder / "items", "task.kind=sequential", names=("a recommender", "reads no titles"))


def test_initial_embeddings_that_are_not_there(case: Case) -> None:
    words = ("task.kind=sequential", f"task.sequential.init_embeddings={case.folder}")
    case.refuses("train", case.file, *words, names=("holds no item embeddings", "rec-dist embed"))


def test_profile_keeps_out_of_a_folder_of_other_things(case: Case) -> None:
    (case.folder / "run-profile").mkdir()
    (case.folder / "run-profile" / "thesis.txt").write_text("x", encoding="utf-8")
    case.refuses("profile", case.file, "data.path=nowhere", names=("profile.output_dir", "run-profile", "not empty"))


@pytest.mark.parametrize(
    ("words", "names"),
    [
        ([], ("COMMAND",)),
        (["trian", "x.yaml"], ("trian", "train", "--help")),
        (["train"], ("CONFIG", "--help")),
        (["train", "no.yaml"], ("no.yaml", "does not exist", "give the path")),
        (["evaluate", "no.yaml"], ("no.yaml", "does not exist")),
        (["run", "no.yaml"], ("no.yaml", "does not exist")),
        (["verify", "nowhere"], ("nowhere", "neither a prepared data set nor a run directory")),
        (["embed", "no.yaml"], ("FOLDER", "--help")),
        (["embed", "no.yaml", "items"], ("no.yaml", "does not exist")),
        (["embed", ".", "items"], ("is not finished", "rec-dist train")),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, list) else "",
)
def test_words(case: Case, words: list[str], names: tuple[str, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(case.folder)
    case.refuses(*words, names=names)


def test_a_file_that_is_no_yaml(case: Case) -> None:
    case.file.write_text("data: [unclosed\nx: }", encoding="utf-8")
    case.refuses("train", case.file, names=(str(case.file), "not readable YAML"))
    case.file.write_text("- a list\n", encoding="utf-8")
    case.refuses("train", case.file, names=(str(case.file), "no mapping"))


def _csv(case: Case, rows: list[str]) -> list[object]:
    source = case.folder / "source.csv"
    source.write_text("\n".join(["user,item,rating,timestamp,title", *rows]) + "\n", encoding="utf-8")
    return ["prepare", case.file, f"data.source={source}", f"data.path={case.folder / 'prepared'}", "data.min_rating=null"]


@pytest.mark.parametrize(
    ("text", "says"),
    [("extends: ${nope}\n", "nope"), ("extends: .\n", "is a folder"), ("extends: ../{name}/run.yaml\n", "extends itself")],
)
def test_what_a_file_extends(case: Case, tmp_path: Path, text: str, says: str) -> None:
    folder = tmp_path / "extending"
    folder.mkdir()
    (folder / "run.yaml").write_text(text.replace("{name}", folder.name), encoding="utf-8")
    case.refuses("train", folder / "run.yaml", names=(says,))


def test_a_refusal_in_a_linked_run_directory_leaves_nothing(case: Case, tmp_path: Path) -> None:
    (tmp_path / "target").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "target")
    words = (f"train.run_dir={tmp_path / 'link'}", "adapter.target_modules=[nothing]")
    case.refuses("train", case.file, *words, names=("adapter.target_modules",))
    assert not list(tmp_path.glob("target/*"))


def test_data_that_is_empty(case: Case) -> None:
    case.refuses(*_csv(case, []), names=("data.source", "source.csv", "no readable row"))


def test_data_in_which_no_user_has_a_target(case: Case) -> None:
    """Each user has three positives: one for test, one for validation, and one without any history before it."""
    rows = [f"u{user},i{item},5,{item},Title {item}" for user in range(4) for item in range(3)]
    words = [*_csv(case, rows), "data.min_user_interactions=3", "data.split=leave_one_out"]
    case.refuses(*words, names=("data.split (leave_one_out)", "train split", "lower data.min_rating"))


def test_data_in_which_one_time_leaves_a_split_empty(case: Case) -> None:
    rows = [f"u{user},i{item},5,77,Title {item}" for user in range(4) for item in range(6)]
    words = [*_csv(case, rows), "data.split=global_temporal"]
    case.refuses(*words, names=("data.split (global_temporal)", "split without a target", "choose user_ratio"))


def test_data_in_which_every_user_is_too_short(case: Case) -> None:
    rows = [f"u{user},i{item},5,{item},Title {item}" for user in range(4) for item in range(2)]
    case.refuses(*_csv(case, rows), names=("data.source", "data.min_user_interactions (5)", "lower them"))


def test_a_row_that_cannot_be_read(case: Case) -> None:
    rows = [f"u{user},i{item},5,{item},Title {item}" for user in range(4) for item in range(6)]
    case.refuses(*_csv(case, [*rows, "u9,i9,five,7,Nine"]), names=("source.csv", "five", "data.max_bad_rows"))


def test_an_empty_title(case: Case) -> None:
    rows = [f"u{user},i{item},5,{item},Title {item}" for user in range(4) for item in range(6)]
    case.refuses(*_csv(case, [*rows, "u0,i7,5,9,  "]), names=("source.csv:26", "i7", "has no title", "data.max_bad_rows"))


def test_a_title_that_this_tokenizer_drops(case: Case, tiny_model_dir: Path) -> None:
    from tokenizers import normalizers
    from transformers import AutoTokenizer

    from rec_dist.cli import main

    model = case.folder / "model"
    shutil.copytree(tiny_model_dir, model)
    tokenizer = AutoTokenizer.from_pretrained(str(model))
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("!", "")
    tokenizer.save_pretrained(str(model))
    rows = [f"u{user},i{item},5,{item},{'!!!' if item == 3 else f'Title {item}'}" for user in range(4) for item in range(6)]
    words = _csv(case, rows)
    assert main([str(word) for word in [*words, "data.split=leave_one_out"]]) == 0
    overrides = [f"data.path={case.folder / 'prepared'}", f"model.path={model}", "train.global_batch_size=2", "negatives.num=0"]
    case.refuses(
        "train", case.file, *overrides, names=("item", "'!!!'", "tokenises to nothing", "give it a title or drop the item")
    )


def test_another_run_lies_there(case: Case, capsys: pytest.CaptureFixture[str]) -> None:
    from rec_dist.cli import main

    assert main(["evaluate", str(case.file), "evaluate.ranker=popularity", f"evaluate.output_dir={case.run_dir}"]) == 0
    case.refuses("train", case.file, "task.beta=2", names=("train.run_dir", "task.beta", "choose another train.run_dir"))


def test_other_files_lie_there(case: Case) -> None:
    case.run_dir.mkdir()
    (case.run_dir / "thesis.txt").write_text("years of work", encoding="utf-8")
    case.refuses("train", case.file, names=("train.run_dir", "not empty", "choose another folder"))


def test_a_run_that_is_not_finished(case: Case) -> None:
    from rec_dist.config.load import load_config
    from rec_dist.config.yaml_text import to_yaml
    from rec_dist.runtime.run_directory import RunDirectory

    config = load_config(case.file)
    RunDirectory(case.run_dir).claim(config.model_dump(mode="json"), to_yaml(config))
    case.refuses("evaluate", case.run_dir, names=(str(case.run_dir), "not finished", "rec-dist train"))
    overrides = [f"train.init_from={case.run_dir}", f"train.run_dir={case.folder / 'next'}"]
    case.refuses("train", case.file, *overrides, names=("train.init_from", "no finished model", "let that run finish first"))


def test_a_folder_that_is_no_run(case: Case) -> None:
    (case.folder / "empty").mkdir()
    case.refuses("evaluate", case.folder / "empty", names=("empty", "no run directory", "config.yaml"))


def test_a_finished_run_that_was_damaged_or_is_to_go_on(case: Case) -> None:
    code, child = run_command(case.folder / "out", "train", case.file)
    assert code == 0, child.err
    names = ("train.max_steps", f"train.init_from={case.run_dir}", "another train.run_dir")
    case.refuses("train", case.file, "train.max_steps=9", names=names)
    case.refuses("export", case.run_dir, "--out", case.file, names=(f"--out ({case.file}) is no folder", "choose another folder"))
    case.refuses(
        "export", case.run_dir, "--out", case.run_dir, names=(f"--out ({case.run_dir}) exists", "choose a folder that does not")
    )
    weights = next((case.run_dir / "model").glob("*.safetensors"))
    weights.rename(case.folder / "elsewhere")
    case.refuses("evaluate", case.run_dir, names=("model holds no weights", "remove finished.json", "rec-dist train"))
    for name, way_out in (("finished.json", "remove that file"), ("config.json", "remove that folder")):
        path = case.run_dir / name
        whole = path.read_text(encoding="utf-8")
        for damaged in (whole[: len(whole) // 2], "[]", ""):
            path.write_text(damaged, encoding="utf-8")
            case.refuses("train", case.file, names=(name, way_out))
        path.write_text(whole, encoding="utf-8")


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["evaluate.num_candidates=80"], ("evaluate.num_candidates", "80", "lower evaluate.num_candidates")),
        (["evaluate.num_candidates=1"], ("evaluate.num_candidates (1)", "2 or more")),
        (["evaluate.num_candidates=some"], ("evaluate.num_candidates", "'some'", "all")),
        (["evaluate.questions=/no/such.csv"], ("evaluate.questions (/no/such.csv)", "does not exist", "name a file")),
        (["evaluate.questions=s3://bucket/rows.csv"], ("evaluate.questions", "is a URI", "give a folder")),
        (
            ["train.max_tokens_per_micro_batch=30"],
            ("train.max_tokens_per_micro_batch (30)", "user", "raise it or lower prompt.max_history"),
        ),
        (["model.path=/no/such/model"], ("model.path", "/no/such/model")),
        (["cluster.num_workers=2"], ("cluster.num_workers (2)", "cluster.launcher=ray")),
        (["prompt.candidates=listed"], ("evaluate.num_candidates (10)", "prompt.num_candidates (20)", "must equal")),
    ],
    ids=lambda value: "+".join(value) if isinstance(value, list) else "",
)
def test_evaluate(case: Case, overrides: list[str], names: tuple[str, ...]) -> None:
    case.refuses("evaluate", case.file, *overrides, names=names)


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def test_a_flipped_bit_in_a_data_set(case: Case, tiny_data: Path) -> None:
    from rec_dist.cli import main

    copy = case.folder / "prepared"
    shutil.copytree(tiny_data, copy)
    assert main(["verify", str(copy)]) == 0
    shard = next(copy.glob("train-*.arrow"))
    _flip(shard)
    case.refuses("verify", copy, names=(shard.name, "SHA-256", "prepare"))


def test_a_flipped_bit_is_refused_before_training(case: Case, tiny_data: Path) -> None:
    copy = case.folder / "prepared"
    shutil.copytree(tiny_data, copy)
    _flip(copy / "items.arrow")
    case.refuses("train", case.file, f"data.path={copy}", names=("items.arrow has changed", "rec-dist prepare"))


def test_a_cache_that_cannot_be_written(case: Case) -> None:
    case.refuses("train", case.file, "data.cache_dir=/dev/null/x", names=("data.cache_dir (/dev/null/x)", "cannot be used"))


@pytest.mark.parametrize(
    ("stages", "names"),
    [
        ([], ("pipeline.stages has no evaluate stage",)),
        ([{"name": "a", "do": "train", "target": "x"}], ("pipeline.stages has no evaluate stage",)),
        ([{"name": "a", "do": "fly", "target": "x"}], ("pipeline.stages", "'fly'")),
        ([{"name": "a", "do": "train", "target": "x"}] * 2, ("pipeline.stages", "a twice")),
        ([{"name": "a", "do": "embed", "target": "x"}], ("pipeline.stages: a has no key `to`",)),
        ([{"name": "a", "do": "train", "target": "x", "to": "y"}], ("pipeline.stages: a has a key `to`", "embed alone")),
        (
            [{"name": "a", "do": "train", "target": "gone.yaml"}],
            ("pipeline.stages: a names gone.yaml", "not beside pipeline.yaml"),
        ),
        ([{"name": "a", "do": "train", "target": "x", "wings": 2}], ("wings", "is no key")),
    ],
)
def test_pipeline(case: Case, stages: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    path = case.folder / "pipeline.yaml"
    value = {"pipeline": {"title": "T", "run_dir": str(case.folder / "report"), "stages": stages}}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    case.refuses("run", path, names=names)


@pytest.mark.parametrize(
    "words",
    [
        ("prepare",),
        ("train",),
        ("train", "train.run_dir=runs/x", "data.path=x"),  # sections of a run on the command line make it none
        ("evaluate",),
        ("profile",),
        ("plan",),
        ("submit", "--to", "slurm", "--dry-run"),
        ("export-rows", "--out", "rows.jsonl"),
    ],
    ids=" ".join,
)
def test_a_pipeline_is_no_run(case: Case, words: tuple[str, ...]) -> None:
    path = case.folder / "pipeline.yaml"
    value = {"vars": {"a": "b"}, "pipeline": {"title": "T", "run_dir": str(case.folder / "report"), "stages": []}}
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    said = case.refuses(words[0], path, *words[1:], names=(f"{path} is a pipeline of stages", "`rec-dist run`", "one run"))
    assert "is no key" not in said


@pytest.mark.parametrize("overrides", [[], ["pipeline.title=T"]], ids=" ".join)
def test_a_run_is_no_pipeline(case: Case, overrides: list[str]) -> None:
    names = (f"{case.file} is the configuration of one run", "`rec-dist train`", "the section `pipeline`")
    assert "is no key" not in case.refuses("run", case.file, *overrides, names=names)


def test_a_file_that_is_neither_a_run_nor_a_pipeline_gets_what_it_lacks(case: Case) -> None:
    case.refuses("run", case.write({"pipelin": {"title": "T"}}), names=("pipeline is missing", "pipelin.title is no key"))


@pytest.mark.slow
def test_from_a_shell_nothing_else_is_printed(case: Case) -> None:
    """What the tests above cannot see: libraries that print, and the exit code of the process."""
    command = [sys.executable, "-m", "rec_dist", "train", str(case.file), "task.kind=sdpo", "negatives.num=75"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    case.check(done.returncode, done.stderr, ("negatives.num (75)",))
    assert len(done.stderr.splitlines()) == 1
    assert not case.run_dir.exists()


def test_the_version_and_nothing_else() -> None:
    """Not a mistake, but a contract as well: exit code 0, one line."""
    from rec_dist import __version__

    done = subprocess.run([sys.executable, "-m", "rec_dist", "--version"], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"{__version__}\n", "")


@pytest.mark.parametrize("command", [["recipes"], ["--help"], ["plan", "llama3-8b:sdpo"]])
@pytest.mark.parametrize("unbuffered", ["1", ""])
def test_a_reader_that_leaves_early_is_no_traceback(command: list[str], unbuffered: str) -> None:
    read, write = os.pipe()
    os.close(read)
    try:
        done = subprocess.run(
            [sys.executable, "-m", "rec_dist", *command],
            stdout=write,
            stderr=subprocess.PIPE,
            text=True,
            check=False,
            env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        )
    finally:
        os.close(write)
    assert done.stderr == ""
    assert done.returncode == (0 if command == ["--help"] and unbuffered else 1)  # argparse drops it by itself
