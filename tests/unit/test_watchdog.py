"""What the driver does while workers run, with real heartbeats in a real run directory and a clock that a test sets."""

import json
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from rec_dist.errors import StopRequested, WorkerFailedError
from rec_dist.launch.restart import NeverStartedError, with_restarts
from rec_dist.launch.watchdog import Cluster, Supervisor, Timeouts
from rec_dist.runtime.heartbeat import Beat, Heartbeat, SupersededError, begin_attempt, pause_wanted, read_beats
from rec_dist.runtime.run_directory import RunDirectory


class Scene:
    """A run directory, a clock, and a cluster that records what it is told and asked to do."""

    def __init__(self, folder: Path, *, hang: float = 30.0, grace: float = 60.0) -> None:
        self.run = RunDirectory(folder / "run")
        begin_attempt(self.run.attempt)
        self.now, self.leaving, self.fits_without, self.more = 0.0, [], False, 0
        self.ended: list[tuple[list[int], Path | None]] = []
        cluster = Cluster(
            end=self._end,
            leaving=lambda nodes: [node for node in self.leaving if node in nodes],
            without=lambda leaving: self.fits_without,
            more=lambda: self.more,
        )
        self.watch = Supervisor(self.run, Timeouts(hang, grace), cluster, every_steps=10, clock=lambda: self.now)

    def _end(self, beats: Any, stacks: Path | None) -> list[str]:
        self.ended.append(([beat.rank for beat in beats], stacks))
        return [f"rank {beat.rank}" for beat in beats]

    def beat(self, rank: int, step: int, *, node: str = "a") -> None:
        beat = Beat(rank, 1, node, 1, "step", step, step)
        (self.run.attempt / f"rank-{rank}.json").write_text(json.dumps(asdict(beat)), encoding="utf-8")

    def after(self, seconds: float) -> None:
        self.now += seconds
        self.watch.tick()


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    return Scene(tmp_path)


def test_a_hang_is_no_progress_on_any_rank(scene: Scene) -> None:
    scene.after(25)  # no worker has begun yet
    assert scene.watch.fault is None
    scene.beat(0, 4)
    scene.beat(1, 4)
    scene.after(20)
    scene.after(20)
    scene.beat(1, 5)  # one that makes progress is enough: the other waits for it
    scene.after(20)
    scene.after(20)
    assert scene.watch.fault is None and not scene.ended
    scene.after(20)
    assert scene.ended == [([0, 1], scene.run.stacks)]
    assert isinstance(scene.watch.fault, WorkerFailedError)
    assert "no worker made progress for 40 s" in str(scene.watch.fault) and "rank-1.txt" in str(scene.watch.fault)
    scene.after(100)
    assert len(scene.ended) == 1


def test_workers_that_never_begin_end_the_run(scene: Scene) -> None:
    """There is no process to kill, so another attempt would meet those that hang."""
    scene.after(25)
    assert scene.watch.fault is None
    scene.after(10)
    assert isinstance(scene.watch.fault, NeverStartedError) and not scene.ended
    assert "no worker gave a sign of life for 35 s (cluster.hang_seconds 30)" in str(scene.watch.fault)
    attempts: list[int] = []

    def attempt() -> dict[str, Any]:
        attempts.append(1)
        assert scene.watch.fault is not None
        raise scene.watch.fault

    with pytest.raises(NeverStartedError):
        with_restarts(attempt, scene.run, limit=3)
    assert len(attempts) == 1


def test_zero_waits_for_ever(tmp_path: Path) -> None:
    scene = Scene(tmp_path, hang=0.0)
    scene.beat(0, 1)
    scene.after(1)
    scene.after(1e6)
    assert scene.watch.fault is None


def test_a_stop_is_granted_in_time_or_cut_short(scene: Scene) -> None:
    scene.beat(0, 1)
    (scene.run.path / "stop").write_text("40", encoding="utf-8")  # a step to stop after is no hurry
    for number in range(8):
        scene.beat(0, number)
        scene.after(20)
    assert scene.watch.fault is None
    scene.run.request_stop()
    for number in range(3):
        scene.beat(0, 100 + number)
        scene.after(20)
    assert scene.watch.fault is None
    scene.beat(0, 200)
    scene.after(21)
    assert isinstance(scene.watch.fault, StopRequested)
    assert scene.ended == [([0], None)]


def test_a_node_that_leaves_stops_the_run_or_shrinks_it(scene: Scene) -> None:
    scene.beat(0, 13, node="a")
    scene.leaving = ["elsewhere"]
    scene.after(4)
    assert not scene.run.stop_wanted(99)
    scene.leaving = ["a"]
    scene.after(4)
    assert scene.run.stop_wanted(14) and not scene.watch.pausing


def test_with_enough_left_it_goes_on_without(scene: Scene) -> None:
    scene.beat(0, 13, node="a")
    scene.leaving, scene.fits_without = ["a"], True
    scene.after(4)
    assert scene.watch.pausing and pause_wanted(scene.run.attempt, 13) and not scene.run.stop_wanted(99)


@pytest.mark.parametrize(("step", "place"), [(13, 20), (20, 20), (21, 30)])
def test_it_grows_at_the_next_checkpoint(scene: Scene, step: int, place: int) -> None:
    scene.beat(0, step)
    scene.after(4)
    assert not scene.watch.pausing
    scene.more = 1
    scene.after(4)
    assert scene.watch.pausing
    assert [pause_wanted(scene.run.attempt, at) for at in (place - 1, place, place + 1)] == [False, True, True]
    begin_attempt(scene.run.attempt)
    assert not pause_wanted(scene.run.attempt, place)


def test_a_worker_whose_driver_is_gone_ends_when_another_begins(tmp_path: Path) -> None:
    begin_attempt(tmp_path)
    with Heartbeat(tmp_path, 3, "a") as heart:
        heart.beat("load")
        heart.beat("step", 7)
        assert [(beat.rank, beat.phase, beat.step, beat.node) for beat in read_beats(tmp_path)] == [(3, "step", 7, "a")]
        begin_attempt(tmp_path)
        assert read_beats(tmp_path) == []
        with pytest.raises(SupersededError):
            heart.beat("checkpoint", 7)
        assert read_beats(tmp_path) == []


def test_beats_of_one_phase_are_written_twice_a_second_at_most(tmp_path: Path) -> None:
    with Heartbeat(tmp_path, 0, "") as heart:
        heart.beat("step", 1)
        before = (tmp_path / "rank-0.json").stat().st_mtime_ns
        for _ in range(1000):
            heart.beat()
        assert (tmp_path / "rank-0.json").stat().st_mtime_ns == before
        heart.beat("data", 2)
        assert read_beats(tmp_path)[0].count == 1002
