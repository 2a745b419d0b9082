"""What scores in the driver tells how far it is, block by block: cluster.hang_seconds ends a process that does not."""

from pathlib import Path
from typing import Any

import pytest
from finished_runs import NUM_USERS, finished_run

import rec_dist
from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.evaluation import measure
from rec_dist.methods.ensemble.members import feature_blocks
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation
from rec_dist.runtime.run_directory import RunDirectory


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
