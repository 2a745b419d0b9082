"""Manifests, indexes and names that somebody else wrote: none of them makes a reader open, write or remove a file elsewhere."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from prepared_rows import Row, write_prepared

from rec_dist.checkpoint import files as checkpoint
from rec_dist.checkpoint.remote_files import drop_damaged, newest_valid
from rec_dist.data.artifacts import reference_store
from rec_dist.data.artifacts.embeddings import PartFiles, read_embeddings
from rec_dist.data.artifacts.teacher import TopItems, read_teacher, write_teacher
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.verify import verify
from rec_dist.errors import UserError
from rec_dist.models.hub import weight_files
from rec_dist.storage.checksums import damaged_files, describe, parse_entry, write_checksums
from rec_dist.storage.files import fingerprint, sha256, write_json
from rec_dist.storage.location import Location
from rec_dist.storage.uri import is_below

_TOUCHED: list[str] = []
_watched: str | None = None


def _note(event: str, arguments: tuple[Any, ...]) -> None:
    if _watched is None or not event.startswith(("open", "os.", "shutil.")):
        return
    for value in arguments:
        if isinstance(value, str | os.PathLike) and os.path.realpath(value).startswith(_watched):
            _TOUCHED.append(f"{event} {value}")


sys.addaudithook(_note)  # cannot be removed again; without a watched folder it returns at once


class Outside:
    """A folder with one file, which nothing may open, change or remove inside `untouched`."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.canary = folder, folder / "canary.arrow"
        folder.mkdir()
        self.canary.write_bytes(b"not yours")
        self.size, self.digest = self.canary.stat().st_size, sha256(self.canary)

    def untouched(self, work: Callable[[], object]) -> None:
        global _watched
        _TOUCHED.clear()
        _watched = str(self.folder)
        try:
            with suppress(UserError):  # no other exception is allowed
                work()
        finally:
            _watched = None
        assert _TOUCHED == []
        assert [path.name for path in self.folder.iterdir()] == ["canary.arrow"]
        assert self.canary.read_bytes() == b"not yours"


@dataclass(frozen=True)
class Case:
    """A folder with a manifest, and everything that reads it."""

    manifest: Path
    read: Callable[[], object]


def _checkpoint_case(folder: Path) -> Case:
    final = checkpoint.folder_of(folder / "checkpoints", 3)
    partial = final.with_name(f"{final.name}.tmp")
    partial.mkdir(parents=True)
    (partial / "state.safetensors").write_bytes(b"state")
    entry = describe(partial / "state.safetensors")
    checkpoint.commit(partial, final, checkpoint.Manifest(3, 1, 0, "b", "c", {"seed": 0}, 0.5, {"torch": None}, [entry]))

    def read() -> None:
        checkpoint.verify(final)
        checkpoint.best(folder / "checkpoints")
        newest_valid(folder / "checkpoints")

    return Case(final / "manifest.json", read)


def _data_case(folder: Path) -> Case:
    rows = {split: [Row(1, [0, 1, 2], 1)] for split in ("train", "valid", "test")}
    write_prepared(folder / "data", rows, ["a", "b", "c"])

    def read() -> None:
        verify(folder / "data")
        PreparedData.open(folder / "data", cache=str(folder / "cache")).split("train").items_of(0)

    return Case(folder / "data" / "manifest.json", read)


def _cases(folder: Path) -> dict[str, Case]:
    model, vectors, store, teacher = (folder / name for name in ("model", "vectors", "store", "teacher"))
    for made in (model, teacher):
        made.mkdir(parents=True)
    (model / "weights").write_bytes(b"weights")
    write_checksums(model)
    parts = PartFiles(vectors, "key", [0, 2])
    parts.write(0, np.ones((2, 3), dtype=np.float32))
    parts.join({"inputs": {"data": "d"}})
    reference_store.write_part(store, 0, np.arange(2), np.arange(3), np.ones(2, dtype=np.float32))
    reference_store.commit(store, "key", 1)
    (teacher / "model.safetensors").write_bytes(b"weights")
    lists = TopItems(np.arange(1), np.arange(1), np.ones((1, 2), dtype=np.int32))
    weights = teacher / "model.safetensors"
    write_teacher(teacher, np.ones((2, 3), dtype=np.float32), [lists], top_h=2, weights=weights, data_fingerprint="d")

    def read_store() -> None:
        if reference_store.is_current(store, "key"):
            reference_store.load(store)

    return {
        "checkpoint": _checkpoint_case(folder / "run"),
        "data set": _data_case(folder),
        "model": Case(model / "files.json", lambda: damaged_files(model)),
        "embeddings": Case(vectors / "embeddings.json", lambda: read_embeddings(vectors, data_fingerprint="d")),
        "reference": Case(store / "manifest.json", read_store),
        "teacher": Case(teacher / "teacher.json", lambda: read_teacher(teacher, data_fingerprint="d")),
    }


@pytest.fixture(scope="module")
def outside(tmp_path_factory: pytest.TempPathFactory) -> Outside:
    return Outside(tmp_path_factory.mktemp("hostile") / "outside")


@pytest.fixture(scope="module")
def cases(outside: Outside) -> dict[str, Case]:
    return _cases(outside.folder.parent / "inside")


def entries_in(value: Any) -> Iterator[dict[str, Any]]:
    """Every mapping of a JSON document that describes a file."""
    if isinstance(value, dict) and "sha256" in value:
        yield value
    elif isinstance(value, dict | list):
        for each in value.values() if isinstance(value, dict) else value:
            yield from entries_in(each)


_PARTS = st.sampled_from(["..", ".", "", "outside", "canary.arrow", "shards", "a", "\0", "~"])
_WAYS_OUT = st.one_of(
    st.integers(1, 5).map(lambda up: "../" * up + "outside/canary.arrow"),
    st.lists(_PARTS, min_size=1, max_size=6).map("/".join),
    st.text(max_size=20),
    st.just("CANARY"),  # replaced by the absolute path
)


@pytest.mark.parametrize("kind", ["checkpoint", "data set", "model", "embeddings", "reference", "teacher"])
@given(name=_WAYS_OUT, field=st.sampled_from(["name", "sha256"]), choice=st.integers(0, 99))
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_hostile_manifest_touches_nothing_outside_its_folder(
    kind: str, name: str, field: str, choice: int, cases: dict[str, Case], outside: Outside
) -> None:
    """Size and hash are those of the file outside, so that nothing but the form of the name speaks against it."""
    case = cases[kind]
    whole = case.manifest.read_bytes()
    body = json.loads(whole)
    del body["checksum"]
    entries = list(entries_in(body))
    entry = entries[choice % len(entries)]
    entry |= {"bytes": outside.size, "sha256": outside.digest}
    entry[field] = str(outside.canary) if name == "CANARY" else name
    try:
        with suppress(UnicodeEncodeError):  # half a character cannot be written
            write_json(case.manifest, {**body, "checksum": fingerprint(body)})
            outside.untouched(case.read)
    finally:
        case.manifest.write_bytes(whole)


@given(name=_WAYS_OUT)
@settings(max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_name_that_leads_out_is_no_file_of_a_location(name: str, outside: Outside) -> None:
    inside = outside.folder.parent / "inside" / "place"
    inside.mkdir(parents=True, exist_ok=True)
    source = outside.folder.parent / "source"
    source.write_bytes(b"mine")
    place = Location(inside, key="checkpoint.remote")
    name = str(outside.canary) if name == "CANARY" else name
    for action in (place.read, place.remove, lambda name: place.write(source, name)):
        outside.untouched(lambda action=action: action(name))
    if not is_below(name):
        with pytest.raises(UserError, match=r"checkpoint.remote \(.*\) cannot hold a file named"):
            place.remove(name)


@pytest.mark.parametrize("lacks", ["format_version", "base", "config", "files", "checksum"])
def test_a_checkpoint_of_pickles_is_passed_over_here_and_in_a_download(lacks: str, tmp_path: Path) -> None:
    """As DeepSpeed's own shards, which earlier versions loaded: unpickling would run what they hold."""
    case = _checkpoint_case(tmp_path)
    folder = case.manifest.parent
    (folder / "mp_rank_00_model_states.pt").write_bytes(b"cos\nsystem\n(S'exit 1'\ntR.")
    body = json.loads(case.manifest.read_bytes())
    del body[lacks]
    if lacks != "checksum":
        body["checksum"] = fingerprint({key: value for key, value in body.items() if key != "checksum"})
    write_json(case.manifest, body)
    (problem,) = checkpoint.verify(folder)
    assert problem.startswith("step-00000003: manifest.json ")
    assert "\n" not in problem
    assert newest_valid(tmp_path / "checkpoints") == -1
    assert checkpoint.best(tmp_path / "checkpoints") is None
    (line,) = drop_damaged(tmp_path, -1)
    assert line == f"checkpoint passed over: {problem}"
    assert not folder.exists()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"name": "../x"}, "plain name"),
        ({"name": "a/b"}, "plain name"),
        ({"name": "/x"}, "plain name"),
        ({"name": ".."}, "plain name"),
        ({"name": ""}, "plain name"),
        ({"name": "\ud800"}, "plain name"),
        ({"name": "x" * 256}, "plain name"),
        ({"sha256": "../../x"}, "64 hex digits"),
        ({"sha256": "A" * 64}, "64 hex digits"),
        ({"sha256": "a" * 64 + "\n"}, "64 hex digits"),
        ({"bytes": -1}, "bytes"),
        ({"rows": -1}, "rows"),
    ],
)
def test_an_entry_of_another_form_says_what_is_wrong(change: dict[str, Any], says: str) -> None:
    entry = {"name": "x", "bytes": 1, "sha256": "a" * 64, "rows": 0}
    assert parse_entry(entry).name == "x"
    with pytest.raises(ValueError, match=says):
        parse_entry({**entry, **change})


def test_only_one_function_makes_an_entry_from_a_file() -> None:
    """parse_entry checks its form. `FileEntry(...)` elsewhere takes values that this process has just computed."""
    package = Path(__file__).parents[2] / "rec_dist"
    found = {
        str(path.relative_to(package))
        for path in package.rglob("*.py")
        if any(f"FileEntry({word}" in path.read_text(encoding="utf-8") for word in ("**", "value", "entry"))
    }
    assert found == {"storage/checksums.py"}


@pytest.mark.parametrize("name", ["../canary.arrow", "/etc/passwd", "a/../../canary.arrow", ""])
def test_an_index_of_weights_names_files_of_its_folder_alone(name: str, tmp_path: Path, outside: Outside) -> None:
    write_json(tmp_path / "model.safetensors.index.json", {"weight_map": {"x": "model-1.safetensors", "y": name}})
    with pytest.raises(UserError, match="names a file outside its folder"):
        weight_files(tmp_path)
    outside.untouched(lambda: weight_files(tmp_path))
