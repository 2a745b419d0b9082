"""Power cuts: what is written is on the disk in the right order, and a run resumes from whatever a cut leaves.

Recorded system calls (system_calls.py) hold the order of every writer. A small run is then cut after each of its calls: what was not
synced is gone, and the same command must end as the undisturbed run did. Cost: a minute for the recordings, 2-3 s for a cut.
"""

import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from safetensors.numpy import load_file
from system_calls import Call, Disk, Rules, State, content_of, faults, missing, put, record
from worker_processes import start

from rec_dist.checkpoint.files import committed, folder_of, verify
from rec_dist.cli import main
from rec_dist.runtime.rows import read_rows
from rec_dist.storage.checksums import damaged_files

pytestmark = [pytest.mark.slow, pytest.mark.skipif(missing() is not None, reason=str(missing()))]

Make = Callable[..., dict[str, Any]]
TESTS = Path(__file__).resolve().parents[1]
# Nobody reads these after a power cut: signs of life, requests, locks, marks of what this boot has checked, work in progress.
# evaluation.json is taken away before its predictions are replaced: it must never describe others.
OF_RUNS = r"[^/]+/(attempt|stacks|stop|progress\.json|progress\.tmp|evaluation\.json|\.scores-\d+\.npy|\.fetched)"
RULES = Rules(
    transient=rf"{OF_RUNS}|(.*/)?(\.lock|[^/]*\.lock)|cache/checked|\.[^/]+\.work|embeddings/(\.parts|parts|log\.txt|progress\.json)",
    grows=r"[^/]+/(metrics\.jsonl|log\.txt)",
)
CHANGES = ("task.kind=sdpo", "train.max_steps=2", "checkpoint.every_steps=1", "checkpoint.keep=1")


@dataclass(frozen=True)
class Recording:
    calls: list[Call]
    root: Path  # the folder whose calls were recorded
    config: Path


def recorded(folder: Path, config: dict[str, Any], *words: str) -> Recording:
    """Runs python with `words`, ROOT and the path of `config`, and records what it does below ROOT."""
    root, path = folder / "root", folder / "config.yaml"
    root.mkdir()
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    line = [argument.format(root=root, config=path) for argument in words]
    done, calls = record(
        [sys.executable, *line], root, folder / "trace", env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return Recording(calls, root, path)


@pytest.fixture(scope="module")
def writers(tmp_path_factory: pytest.TempPathFactory, tiny_config: Make) -> Recording:
    """Every writer, in one process."""
    folder = tmp_path_factory.mktemp("writers")
    paths = {"data.path": f"{folder}/root/data", "checkpoint.remote": f"{folder}/root/copy"}
    config = tiny_config(folder / "root" / "run", *CHANGES, paths)
    return recorded(folder, config, str(TESTS / "durable_writers.py"), "{root}", "{config}")


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory, tiny_config: Make) -> Recording:
    """A run of two steps with a checkpoint after each."""
    folder = tmp_path_factory.mktemp("small")
    config = tiny_config(folder / "root" / "run", *CHANGES)
    return recorded(folder, config, "-m", "rec_dist", "train", "{config}")


def test_the_recording_says_what_the_folder_holds(writers: Recording, small_run: Recording) -> None:
    for recording in (writers, small_run):
        disk = Disk(recording.root)
        for call in recording.calls:
            disk.apply(call)
        now, there = disk.now(), content_of(recording.root)
        assert now.keys() == there.keys()
        assert [name for name in now if now[name] != there[name]] == []


def test_every_writer_syncs_renames_and_syncs_the_folder(writers: Recording) -> None:
    assert "\n".join(faults(writers.calls, writers.root, RULES)) == ""
    written = {call.places[-1].removeprefix(f"{writers.root}/") for call in writers.calls if call.name.startswith("rename")}
    for name in (
        *("data", "on_disk", "merged", "replaced", "number.json", "run/model", "run/finished.json", "run/predictions.arrow"),
        *("run/checkpoints/step-00000002", "run/reference/part-00000.arrow", "fetched/model", "fetched/finished.json"),
        *("copy/finished.json", "copy/checkpoints/step-00000002/COMMITTED", "embeddings/embeddings.json"),
    ):
        assert name in written, name
    assert any(name.startswith("cache/shards/") for name in written)


def test_finished_json_is_the_last_file_of_a_run(small_run: Recording) -> None:
    placed = [
        call.places[-1].removeprefix(f"{small_run.root}/run/") for call in small_run.calls if call.name.startswith("rename")
    ]
    lasting = [name for name in placed if name not in ("progress.json",) and not name.startswith("attempt/")]
    assert lasting[-1] == "finished.json"
    assert lasting.index("model") == len(lasting) - 2


def synced(root: Path, text: str, path: str) -> list[Call]:
    """The calls of a writer that does everything right: a file under a temporary name, synced, renamed, the folder synced."""
    hidden = f"{root}/.{path}.tmp"
    return [
        Call("openat", (hidden,), "O_WRONLY|O_CREAT", 3),
        Call("write", (hidden,), "", len(text), text.encode()),
        Call("fsync", (hidden,), "", 0),
        Call("rename", (hidden, f"{root}/{path}"), "", 0),
        Call("fsync", (str(root),), "", 0),
    ]


@pytest.mark.parametrize(
    ("drop", "fault"),
    [
        (2, "a was renamed before it was synced"),
        (4, "a is not on the disk at the end"),
        (None, None),
    ],
)
def test_a_writer_that_leaves_a_step_out_is_found(drop: int | None, fault: str | None) -> None:
    root = Path("/root")
    calls = [call for place, call in enumerate(synced(root, "x", "a")) if place != drop]
    found = faults(calls, root, RULES)
    assert (fault in found) if fault else (found == [])


def test_what_is_taken_away_too_early_or_written_over_is_found() -> None:
    root = Path("/root")
    once, again = synced(root, "x", "a"), synced(root, "y", "a")
    assert faults([*once, *again], root, RULES) == []
    removed = Call("unlink", ("/root/a",), "", 0)
    assert faults([*once, removed, *again], root, RULES) == ["a was taken away before what replaces it stood"]
    over = [
        Call("openat", ("/root/a",), "O_WRONLY", 3),
        Call("write", ("/root/a",), "", 1, b"z"),
        Call("fsync", ("/root/a",), "", 0),
    ]
    assert faults([*once, *over], root, RULES) == ["a was written over where it stood"]


def cuts(recording: Recording) -> Iterator[State]:
    """What a power cut can leave after each call, without repeats: with the names that were synced, and with all names."""
    disk, seen = Disk(recording.root), set[int]()
    for call in recording.calls:
        disk.apply(call)
        for all_names in (False, True):
            state = disk.state(all_names=all_names)
            if (key := hash(tuple(sorted(state.items())))) not in seen:
                seen.add(key)
                yield state


def resume(state: State, small: Recording, folder: Path) -> None:
    """Runs the same command on what a cut left. It must end as the undisturbed run, or say which file is missing."""
    put(state, folder / "left")
    run = folder / "left" / "run"
    whole = [step for step in committed(run / "checkpoints") if not verify(folder_of(run / "checkpoints", step))]
    steps = {row["step"] for row in read_rows(run / "metrics.jsonl") if row.get("event") == "step"}
    assert set(range(1, max(whole, default=0) + 1)) <= steps, "rows up to the newest checkpoint"
    before = sorted(state)
    child = start(main, ["train", str(small.config), f"train.run_dir={run}"], folder=folder / "out")
    code = child.wait()
    if code != 0:
        names = [name for name in before if Path(name).name in child.err]
        assert code == 2 and names, (before, child.err[-2000:])
        return
    assert json.loads((run / "finished.json").read_text())["step"] == 2
    assert damaged_files(run / "model") == []
    there, here = (load_file(path / "model" / "adapter_model.safetensors") for path in (small.root / "run", run))
    assert there.keys() == here.keys()
    assert all((there[name] == here[name]).all() for name in there), before
    assert {row["step"] for row in read_rows(run / "metrics.jsonl") if row.get("event") == "step"} == {1, 2}


def test_a_run_resumes_after_a_power_cut(small_run: Recording, tmp_path: Path) -> None:
    """At five places over the run; the slow test takes all."""
    left = list(cuts(small_run))
    assert len(left) > 20
    for number in range(5):
        resume(left[(number + 1) * (len(left) - 1) // 5], small_run, tmp_path / str(number))


def test_a_run_resumes_after_a_power_cut_at_any_call(small_run: Recording, tmp_path: Path) -> None:
    for number, state in enumerate(cuts(small_run)):
        resume(state, small_run, tmp_path / str(number))
