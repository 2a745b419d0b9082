"""What scores in the driver tells how far it is, block by block: cluster.hang_seconds ends a process that does not."""

import io
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
from finished_runs import NUM_USERS, finished_run

import rec_dist
from rec_dist.commands.progress import _Watch
from rec_dist.config.load import load_config, load_saved
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.engine import process_group
from rec_dist.evaluation import measure
from rec_dist.methods.ensemble.members import feature_blocks
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation
from rec_dist.methods.registry import method_of
from rec_dist.methods.searched_ranks import SearchJob, search_worker
from rec_dist.runtime.heartbeat import read_beats
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

Make = Callable[..., dict[str, Any]]


def test_a_recommender_and_the_features_of_an_ensemble(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = RunDirectory(finished_run(tmp_path / "one"))
    told: list[tuple[str, int, int]] = []
    monkeypatch.setattr(RunDirectory, "progress", lambda self, *what: told.append(what))
    monkeypatch.setattr(measure, "_MOST_EXAMPLES", 10)
    expected = [("evaluate", done, NUM_USERS) for done in (10, 20, NUM_USERS)]
    rec_dist.evaluate(run.path, {"evaluate.num_candidates": "all"})
    assert told == expected

    told.clear()
    config = load_saved(run.config_path, ["evaluate.num_candidates=all"])
    data = open_data(config.data)
    evaluation = Evaluation(config, data, eval_examples_of(config, data), InitialWeights(Path()), None, run)
    launch: Any = None  # no member is on workers
    assert len(list(feature_blocks([], ["popularity"], evaluation, launch))) == 3
    assert told == expected


def test_a_rank_that_goes_on_when_rank_0_has_ended_is_no_hang(
    tmp_path: Path, tiny_config: Make, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rank 1 of two, whose questions rank 0 does not wait for."""
    monkeypatch.setattr(process_group, "joined", lambda world: nullcontext())
    config, run = (
        load_config(tiny_config(tmp_path / "run", "evaluate.num_candidates=all", "evaluate.max_users=4")),
        tmp_path / "out",
    )
    watch = _Watch(RunDirectory(run), io.StringIO(), look_seconds=0.0)
    watch.tick()
    before = watch.changed
    watch.tick()
    assert watch.changed == before
    job = SearchJob(config.model_dump(), str(run), method_of(config).ranker.weights(config, None), None)
    search_worker(World(rank=1, size=2), job)
    assert [(beat.rank, beat.phase) for beat in read_beats(run / "attempt")] == [(1, "evaluate")]
    assert not (run / "progress.json").exists()
    watch.tick()
    assert watch.changed > before
