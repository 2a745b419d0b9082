"""Language models in two stages: in an ensemble they score what cheap members retrieve, and they rank negatives for another run."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from worker_processes import run_command

import rec_dist
from rec_dist.config.load import load_saved
from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.methods.ensemble.features import terms_of
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.methods.registry import method_of

pytestmark = pytest.mark.slow
Make = Callable[..., dict[str, Any]]
NUM = 6


def _run(folder: Path, *words: object) -> None:
    code, child = run_command(folder / "log", *words)
    assert code == 0, child.err


def _write(path: Path, value: dict[str, Any]) -> Path:
    path.write_text(yaml.safe_dump(value), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def runs(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the finished runs neighbours and sft."""
    folder = tmp_path_factory.mktemp("members")
    rec_dist.train(tiny_config(folder / "neighbours", "task.kind=neighbours"))
    _run(folder, "train", _write(folder / "sft.yaml", tiny_config(folder / "sft", "task.kind=sft")))
    return folder


def _scores(run: Path, histories: list[np.ndarray], candidates: list[np.ndarray], parts: bool) -> Any:
    """Scores of a finished run in this process."""
    config = load_saved(run / "config.yaml")
    data, ranker = PreparedData.open(config.data.path), method_of(config).ranker
    with ranker.scoring(config, data, ranker.weights(config, run / "model"), run / "model", "cpu") as scorer:
        return scorer.score_parts(histories, candidates) if parts else scorer.score(histories, candidates)


@pytest.mark.quick
def test_scores_and_recall_by_hand(tiny_config: Make, runs: Path, tmp_path: Path) -> None:
    members = {"task.ensemble.members": {"neighbours": str(runs / "neighbours"), "lm": str(runs / "sft")}}
    keys = ["task.kind=ensemble", f"task.ensemble.rerank={NUM}", "task.ensemble.max_users=20", "evaluate.num_candidates=all"]
    run = tmp_path / "ensemble"
    _run(tmp_path, "train", _write(tmp_path / "ensemble.yaml", tiny_config(run, *keys, members)))
    _run(tmp_path, "evaluate", run)
    learnt, found = EnsembleWeights.read(run / "model"), Predictions.read(run / "predictions.arrow")
    assert learnt.features[-1] == "lm" and learnt.retrieval is not None and learnt.retrieval.num == NUM
    data = rec_dist.prepare(tmp_path / "ensemble.yaml")
    split = data.split("test")
    histories = [split.items_of(int(np.searchsorted(split.user_ids, user)))[:-1] for user in found.user_ids]
    candidates = list(found.candidates)
    parts = _scores(runs / "neighbours", histories, candidates, parts=True)
    features = {f"neighbours.{name}": values for name, values in parts.items()}
    features |= terms_of(learnt.terms, data.train_counts, histories, candidates)
    hits, chosen = [], []
    for n, items in enumerate(candidates):
        first = sum(w * features[f][n] for f, w in zip(learnt.retrieval.features, learnt.retrieval.weights, strict=True))
        order = [place for place in np.argsort(-first, kind="stable").tolist() if items[place] not in histories[n]]
        chosen.append(order[:NUM])
        hits.append(found.targets[n] in items[order[:NUM]])
    titles = _scores(runs / "sft", histories, [items[places] for items, places in zip(candidates, chosen, strict=True)], False)
    for n, items in enumerate(candidates):
        own = np.zeros(len(items))
        own[chosen[n]] = titles[n] - titles[n].mean()
        values = [*(features[name][n] for name in learnt.features[:-1]), own]
        wanted = sum(weight * value for weight, value in zip(learnt.weights, values, strict=True))
        np.testing.assert_allclose(found.scores[n], wanted, atol=2e-4)
    row = rec_dist.Run.open(run).metrics("evaluation")[-1]
    assert row["recall"]["num"] == NUM and row["recall"]["value"] == pytest.approx(np.mean(hits))
    assert 0 < np.mean(hits) < 1 and set(row["shares"]) >= {"lm", "neighbours"}
    # the same in this process, where `rec-dist rank` scores the catalogue without a limit on titles
    ranked = rec_dist.rank(run, split="test", top_k=3, max_catalogue=1).to_pylist()
    name = dict(zip(split.user_ids.tolist(), split.names_of(np.arange(len(split))), strict=True))[int(found.user_ids[0])]
    best = np.argsort(-found.scores[0], kind="stable")[:3]
    mine = [row for row in ranked if row["user_id"] == name]
    unseen = [place for place in best.tolist() if candidates[0][place] not in histories[0]]
    assert [row["item_id"] for row in mine][: len(unseen)] == [data.raw_items[candidates[0][place]] for place in unseen]
    assert mine[0]["score"] == pytest.approx(float(found.scores[0][best[0]]), abs=2e-4)


def test_values_chosen_on_the_validation_split(tiny_config: Make, runs: Path, tmp_path: Path) -> None:
    out = tmp_path / "corrected"
    _run(
        tmp_path,
        "evaluate",
        runs / "sft",
        "evaluate.title_prior=valid",
        "evaluate.length_power=valid",
        f"evaluate.output_dir={out}",
    )
    row = rec_dist.Run.open(out).metrics("evaluation")[-1]
    kept = list(out.glob("title-prior-*.npy"))
    assert len(kept) == 1 and np.load(kept[0]).shape == (80,)
    again = tmp_path / "again"
    fixed = [f"evaluate.{key}={row[key]}" for key in ("title_prior", "length_power")]
    _run(tmp_path, "evaluate", runs / "sft", *fixed, f"evaluate.output_dir={again}")
    one, two = (Predictions.read(folder / "predictions.arrow") for folder in (out, again))
    assert one.ranks.tolist() == two.ranks.tolist()
    np.testing.assert_allclose(np.concatenate(list(one.scores)), np.concatenate(list(two.scores)), atol=1e-5)


def test_a_language_model_ranks_negatives(tiny_config: Make, runs: Path, tmp_path: Path) -> None:
    """Also the run that training starts from. A second command finds the lists."""
    keys = ["task.kind=sdpo", f"train.init_from={runs / 'sft'}", "negatives.kind=model", f"negatives.model={runs / 'sft'}"]
    changes = [*keys, "negatives.pool=12", "negatives.ranks=[2,7]"]
    run = tmp_path / "sdpo"
    _run(tmp_path, "train", _write(tmp_path / "sdpo.yaml", tiny_config(run, *changes)))
    lists = (run / "negatives.arrow").read_bytes()
    assert len(rec_dist.Run.open(run).metrics("step")) == 4
    (run / "finished.json").unlink()
    _run(tmp_path, "train", tmp_path / "sdpo.yaml")
    assert (run / "negatives.arrow").read_bytes() == lists
