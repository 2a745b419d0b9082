"""Folders of runs and data: only their owner may enter, whatever the umask is, unless a key says otherwise."""

import os
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from rec_dist.commands.prepare import prepare
from rec_dist.config.load import load_config
from rec_dist.config.references import recorded
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.runtime.identity import differences
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.location import Location

MODES = {"owner": 0o700, "group": 0o750, "everyone": 0o755}
Make = Callable[..., dict[str, Any]]


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture(params=[0o000, 0o022, 0o077], ids=oct)
def umask(request: pytest.FixtureRequest) -> Iterator[int]:
    before = os.umask(request.param)
    yield request.param
    os.umask(before)


@pytest.mark.parametrize("access", MODES)
def test_a_run_directory(umask: int, access: str, tmp_path: Path) -> None:
    config = load_config({"data": {"path": "/d"}, "train": {"run_dir": str(tmp_path / "run"), "access": access}})
    run = RunDirectory(tmp_path / "run")
    with run.claimed(*recorded(config)):
        assert mode(run.path) == MODES[access]
    with run.claimed(*recorded(config)):
        assert mode(run.path) == MODES[access]


def test_a_run_directory_by_default_and_one_that_was_there(umask: int, tmp_path: Path) -> None:
    with RunDirectory(tmp_path / "run").claimed({}, "{}\n"):
        assert mode(tmp_path / "run") == 0o700
    (tmp_path / "own").mkdir()
    before = mode(tmp_path / "own")
    with RunDirectory(tmp_path / "own").claimed({}, "{}\n"):
        assert mode(tmp_path / "own") == before


@pytest.mark.parametrize("access", MODES)
def test_a_data_set_and_the_cache(umask: int, access: str, tiny_config: Make, tmp_path: Path) -> None:
    paths = {"data.path": str(tmp_path / "data"), "data.access": access, "data.cache_dir": str(tmp_path / "cache")}
    config = load_config(tiny_config(tmp_path / "run", paths))
    prepare(config)
    assert mode(tmp_path / "data") == MODES[access]
    open_data(config.data)
    assert mode(tmp_path / "cache") == 0o700


def test_a_copy_in_a_folder(umask: int, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    Location(tmp_path / "copy").write(tmp_path / "file", "below/file")
    assert mode(tmp_path / "copy") == 0o700


def test_who_may_enter_is_no_part_of_what_is_trained_or_prepared(tiny_config: Make, tmp_path: Path) -> None:
    one, other = (load_config(tiny_config(tmp_path / "run", {"train.access": a, "data.access": a})) for a in ("owner", "group"))
    assert differences(one.model_dump(), other.model_dump()) == []
    marks = set()
    for config, name in ((one, "a"), (other, "b")):
        marks.add(
            prepare(config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / name)})})).fingerprint
        )
    assert len(marks) == 1
