"""The Python API without training: a quick import, three forms of a configuration, errors, tables instead of files, messages."""

import logging
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import yaml

import rec_dist
from rec_dist.errors import UserError

Make = Callable[..., dict[str, Any]]
_ROOT = Path(__file__).parents[2]


def python(*words: str, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs Python in a process of its own, with this checkout's packages."""
    path = os.pathsep.join([str(Path(rec_dist.__file__).parents[1]), str(_ROOT / "kernels")])
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env={**os.environ, "PYTHONPATH": path}, capture_output=True, text=True, timeout=300
    )


def test_the_import_is_quick_and_loads_no_torch(tmp_path: Path) -> None:
    """The time is the best of three, since other processes may hold the cores."""
    program = (
        "import sys, time; began = time.perf_counter(); import rec_dist; print(time.perf_counter() - began);"
        "print(sorted({'torch', 'transformers', 'pyarrow', 'ray', 'pydantic'} & set(sys.modules)))"
    )
    seconds = []
    for _ in range(3):
        done = python("-c", program, folder=tmp_path)
        time, loaded = done.stdout.split(maxsplit=1)
        assert loaded.strip() == "[]", done.stderr
        seconds.append(float(time))
    assert min(seconds) < 0.2, seconds


def test_names_that_are_packages_too_stay_functions(tmp_path: Path) -> None:
    """Importing a submodule sets an attribute of the package, so no submodule may have the name of a function."""
    program = (
        "import pkgutil, importlib, rec_dist\n"
        "for found in pkgutil.walk_packages(rec_dist.__path__, 'rec_dist.'):\n"
        "    if found.name.count('.') == 1 and not found.name.endswith('__main__'): importlib.import_module(found.name)\n"
        "print([name for name in ('prepare', 'train', 'evaluate') if not callable(getattr(rec_dist, name))])"
    )
    done = python("-c", program, folder=tmp_path)
    assert done.stdout.strip() == "[]", done.stderr


@pytest.mark.slow
def test_a_script_of_a_user_type_checks(tmp_path: Path) -> None:
    """py.typed is true: strict mypy reads the API's types from the installed package."""
    (tmp_path / "script.py").write_text(
        """
import rec_dist
import pyarrow as pa  # type: ignore[import-untyped, unused-ignore]

data = rec_dist.prepare({"data": {"path": "prepared"}}, interactions=pa.table({}))
count: int = data.num_items
run: rec_dist.Run = rec_dist.train("config.yaml", ["train.max_steps=10"])
steps: int = run.config.train.max_steps or 0
low: float = rec_dist.evaluate(run, {"evaluate.split": "valid"})["hr@1"]["low"]
rec_dist.evaluate(run.path)
try:
    rec_dist.load_config(run.config, {"train": {"seed": 1}})
except rec_dist.errors.UserError as fault:
    print(fault, rec_dist.__version__)
reveal_type(rec_dist.train)
""",
        encoding="utf-8",
    )
    # Large libraries without a name in the API are left out, which takes 10 s instead of minutes.
    others = (
        "torch",
        "numpy",
        "pandas",
        "pyarrow",
        "deepspeed",
        "transformers",
        "peft",
        "ray",
        "triton",
        "omegaconf",
        "matplotlib",
    )
    sections = [f"[mypy-{name}.*]\nfollow_imports = skip\nignore_missing_imports = True" for name in (*others, "tqdm", "yaml")]
    head = "[mypy]\nstrict = True\nfollow_imports = silent\nplugins = pydantic.mypy\n"
    (tmp_path / "mypy.ini").write_text(head + "\n".join(sections), encoding="utf-8")
    path = os.pathsep.join([str(Path(rec_dist.__file__).parents[1]), str(_ROOT / "kernels")])
    words = ["-m", "mypy", "--cache-dir", str(tmp_path / "cache"), "script.py"]
    done = subprocess.run(
        [sys.executable, *words], cwd=tmp_path, env={**os.environ, "MYPYPATH": path}, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout
    assert "-> rec_dist.training_run.Run" in done.stdout


def test_a_path_a_mapping_and_a_configuration_are_the_same(tiny_config: Make, tmp_path: Path) -> None:
    value = tiny_config(tmp_path / "run")
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(value), encoding="utf-8")
    words = ["train.max_steps=3", "optimizer.lr=1e-4"]
    expected = rec_dist.load_config(file, words)
    assert expected.train.max_steps == 3 and expected.optimizer.lr == 1e-4
    of_file = rec_dist.load_config(str(file))
    for config in (str(file), value, of_file):
        for overrides in (
            words,
            {"train.max_steps": 3, "optimizer.lr": 1e-4},
            {"train": {"max_steps": 3}, "optimizer": {"lr": 1e-4}},
        ):
            assert rec_dist.load_config(config, overrides) == expected
    assert rec_dist.load_config(of_file) is of_file
    assert rec_dist.load_config(value, "train.max_steps=3").train.max_steps == 3
    paths = {**value, "train": {**value["train"], "run_dir": tmp_path / "run"}}
    assert rec_dist.load_config(paths) == of_file
    assert rec_dist.load_config({"extends": file, "train": {"max_steps": 3}}, ["optimizer.lr=1e-4"]) == expected


@pytest.mark.parametrize(
    ("overrides", "names"),
    [
        (["tsak.beta=1"], ("the configuration", "tsak.beta is no key", "did you mean task.beta?")),
        ({"task": {"bteta": 1}}, ("task.bteta is no key", "did you mean task.beta?")),
        ({"train.max_steps": "many"}, ("train.max_steps", "integer", "'many'")),
        ({"train.max_steps": {1, 2}}, ("train.max_steps", "cannot be set to {1, 2}")),
        (["train.max_steps"], ("train.max_steps", "section.key=value")),
    ],
)
def test_a_faulty_configuration_is_an_exception(
    tiny_config: Make, tmp_path: Path, overrides: Any, names: tuple[str, ...]
) -> None:
    for call in (rec_dist.load_config, rec_dist.prepare, rec_dist.train, rec_dist.evaluate):
        with pytest.raises(UserError) as caught:
            call(tiny_config(tmp_path / "run"), overrides)  # type: ignore[operator]
        assert not [name for name in names if name not in str(caught.value)], caught.value
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("text", ["${nowhere}", "a \\\\${b} ${c", "\\\\\\\\${x}$${y}"])
def test_text_with_a_dollar_stays_as_it_is(tiny_config: Make, tmp_path: Path, text: str) -> None:
    from rec_dist.config.yaml_text import to_yaml

    config = rec_dist.load_config(tiny_config(tmp_path / "run"))
    config = config.model_copy(update={"prompt": config.prompt.model_copy(update={"instruction": text})})
    (tmp_path / "config.yaml").write_text(to_yaml(config), encoding="utf-8")
    assert rec_dist.load_config(tmp_path / "config.yaml") == config
    assert rec_dist.load_config(config, {"train.seed": 3}).prompt.instruction == text


def test_numbers_of_numpy(tiny_config: Make, tmp_path: Path) -> None:
    changes = {"train.max_steps": np.int64(3), "optimizer.lr": np.float64(0.5), "cluster.use_gpu": np.bool_(False)}
    config = rec_dist.load_config(tiny_config(tmp_path / "run"), changes)
    assert (config.train.max_steps, config.optimizer.lr, config.cluster.use_gpu) == (3, 0.5, False)


@pytest.mark.parametrize("config", [None, 5, [1], b"config.yaml"])
def test_what_is_no_configuration(config: Any) -> None:
    with pytest.raises(UserError, match=f"not of type {type(config).__name__}"):
        rec_dist.load_config(config)


@pytest.mark.parametrize("overrides", [None, 5, [5]])
def test_what_is_no_override(tiny_config: Make, tmp_path: Path, overrides: Any) -> None:
    with pytest.raises(UserError, match=r"override.*section\.key=value"):
        rec_dist.load_config(tiny_config(tmp_path / "run"), overrides)


def test_a_run_that_is_none(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no run directory.*train\.run_dir"):
        rec_dist.Run.open(tmp_path)
    with pytest.raises(UserError, match="no run directory"):
        rec_dist.evaluate(tmp_path)


def test_an_unknown_name() -> None:
    with pytest.raises(AttributeError, match="no attribute 'trian'"):
        rec_dist.trian  # noqa: B018
    assert set(rec_dist.__all__) >= {"prepare", "train", "evaluate", "score", "register_method", "Run", "errors"}


def test_a_hook_for_exceptions_and_warnings_stay_as_they_were(recwarn: pytest.WarningsRecorder) -> None:
    """torch.distributed sets a hook, and huggingface_hub warns if HF_HUB_DISABLE_PROGRESS_BARS is set."""
    from transformers.utils import logging as of_transformers

    from rec_dist.runtime.process_state import restored

    hook, shown = sys.excepthook, of_transformers.is_progress_bar_enabled()
    of_transformers.enable_progress_bar()
    recwarn.clear()
    with restored():
        sys.excepthook = lambda *_: None
        of_transformers.disable_progress_bar()
    assert sys.excepthook is hook and not list(recwarn)
    if not shown:
        of_transformers.disable_progress_bar()


# Tables in place of files.


@pytest.fixture(scope="module")
def frame(tiny_source: Path) -> pd.DataFrame:
    return pd.read_csv(tiny_source)


def prepared(make: Make, folder: Path, **tables: Any) -> Any:
    """The data set of tables, with a configuration that names no source."""
    config = make(folder / "run")
    del config["data"]["source"]
    return rec_dist.prepare(config, {"data.path": folder / "data", **tables.pop("overrides", {})}, **tables)


def same(left: Any, right: Any) -> bool:
    """Whether two data sets hold the same items and users."""
    rows = [
        (left.split(name).items_of(row).tolist(), right.split(name).items_of(row).tolist())
        for name in ("train", "valid", "test")
        for row in range(len(left.split(name)))
    ]
    return (
        (left.titles, left.raw_items, left.categories) == (right.titles, right.raw_items, right.categories)
        and np.array_equal(left.train_counts, right.train_counts)
        and all(ours == theirs for ours, theirs in rows)
    )


def test_tables_give_the_data_set_that_their_file_gives(
    tiny_config: Make, tiny_data: Path, frame: pd.DataFrame, tmp_path: Path
) -> None:
    from rec_dist.data.dataset.prepared_data import PreparedData

    expected = PreparedData.open(tiny_data)
    events = ["user", "item", "rating", "timestamp"]
    items = frame[["item", "title", "categories"]].drop_duplicates("item")
    shuffled = items.sample(frac=1.0, random_state=0)
    renamed = frame.rename(columns={"user": "member", "title": "name"})
    forms: dict[str, dict[str, Any]] = {
        "pandas": {"interactions": frame},
        "arrow": {"interactions": pa.Table.from_pandas(frame).to_batches(max_chunksize=50)},
        "odd-index": {"interactions": frame.set_index(np.arange(len(frame))[::-1]).assign(other="x")},
        "two": {"interactions": frame[events], "items": shuffled},
        "lists": {
            "interactions": pa.table(frame[events]),
            "items": shuffled.assign(categories=[[c] for c in shuffled.categories]),
        },
        "renamed": {"interactions": renamed, "overrides": {"data.columns": {"user": "member", "title": "name"}}},
        "on-disk": {"interactions": frame, "overrides": {"data.prepare_on": "disk"}},
    }
    forms["arrow"]["interactions"] = pa.Table.from_batches(forms["arrow"]["interactions"])
    marks = {}
    for name, tables in forms.items():
        data = prepared(tiny_config, tmp_path / name, **tables)
        assert same(data, expected), name
        assert data.manifest.source == "tables"
        marks[name] = data.manifest.fingerprint
    assert marks["pandas"] == marks["arrow"] == marks["odd-index"] == marks["renamed"] == marks["on-disk"]
    again = prepared(tiny_config, tmp_path / "pandas", interactions=frame)
    assert again.manifest.fingerprint == marks["pandas"], "kept"
    with pytest.raises(UserError, match=r"data\.path .* holds a data set of other settings or files"):
        prepared(tiny_config, tmp_path / "pandas", interactions=frame.iloc[:-1])


@pytest.mark.parametrize(
    ("change", "names"),
    [
        (
            lambda f: {"interactions": f.drop(columns="user")},
            ("data.columns.user is not set, and interactions has none of user, user_id", "item, rating"),
        ),
        (lambda f: {"interactions": [1, 2]}, ("interactions is of type list", "pandas or Arrow", "data.source")),
        (lambda f: {"interactions": f, "items": f[["item", "title"]]}, ("items: the item 'i", "stands twice", "keep one row")),
        (
            lambda f: {"interactions": f, "items": f[["item", "title"]].drop_duplicates("item")[1:]},
            ("items has no row of the item", "add them"),
        ),
        (lambda f: {"interactions": f, "items": f[["title"]]}, ("data.columns.item is not set, and items has none of item",)),
        (lambda f: {"interactions": None, "items": f}, ("items", "interactions, which is missing")),
        (
            lambda f: {"interactions": f.assign(user=[{"a": 1}] * len(f))},
            ("column user", "cannot be a user", "data.columns.user"),
        ),
        (
            lambda f: {"interactions": f.assign(item=[1, "a"] * (len(f) // 2) + [2] * (len(f) % 2))},
            ("interactions", "one type each"),
        ),
        (lambda f: {"interactions": f.assign(user=[None, *f.user[1:]])}, ("interactions:1: empty user", "data.max_bad_rows")),
        (lambda f: {"interactions": f[:0]}, ("data.source (tables)", "no readable row")),
        (
            lambda f: {"interactions": f, "overrides": {"data.columns": {"user": "member"}}},
            ("data.columns.user (member) is not a column of interactions",),
        ),
        (lambda f: {"interactions": f, "overrides": {"data.format": "recbole"}}, ("data.format (recbole)", "remove data.format")),
        (
            lambda f: {"interactions": f, "overrides": {"data.prepare_on": "ray"}},
            ("data.prepare_on=ray", "set data.prepare_on=auto"),
        ),
        (lambda f: {}, ("data.source is missing", "ml-100k")),
    ],
)
def test_faulty_tables(
    tiny_config: Make, frame: pd.DataFrame, tmp_path: Path, change: Callable[[pd.DataFrame], Any], names: tuple[str, ...]
) -> None:
    with pytest.raises(UserError) as caught:
        prepared(tiny_config, tmp_path, **change(frame))
    assert not [name for name in names if name not in str(caught.value)], caught.value
    assert "\n" not in str(caught.value)
    assert list(tmp_path.iterdir()) == []


def test_bad_rows_of_a_table_leave_no_temporary_path_behind(tiny_config: Make, frame: pd.DataFrame, tmp_path: Path) -> None:
    faulty = frame.assign(user=[None, *frame.user[1:]])
    data = prepared(tiny_config, tmp_path, interactions=faulty, overrides={"data.max_bad_rows": 1})
    assert [note for note in data.manifest.notes if "interactions:1:" in note and str(tmp_path) not in note]


def test_messages_go_through_logging_and_nothing_is_printed(
    tiny_config: Make, frame: pd.DataFrame, tmp_path: Path, caplog: pytest.LogCaptureFixture, capfd: pytest.CaptureFixture[str]
) -> None:
    with caplog.at_level(logging.INFO, logger="rec_dist"):
        prepared(tiny_config, tmp_path, interactions=frame)
    said = {record.levelname: record for record in caplog.records if record.name.startswith("rec_dist.data.prepare")}
    assert "leave_one_out leaks" in said["WARNING"].getMessage()
    assert "prepared" in said["INFO"].getMessage()
    assert capfd.readouterr() == ("", "")
    assert [type(handler) for handler in logging.getLogger("rec_dist").handlers] == [logging.NullHandler]
