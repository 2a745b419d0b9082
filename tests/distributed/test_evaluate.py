"""Evaluation gives the scores of plain transformers, on any number of workers and in any packing, and is alike for all models."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from worker_processes import run_command, run_workers

_SFT = ("task.kind=sft",)


def scores(run: Any, folder: Path, *changes: str, workers: int = 1, temperature: float | None = None) -> np.ndarray:
    """The scores (U, C) that the workers of `rec-dist evaluate RUN` write; with a temperature, those within the catalogue."""
    from rec_dist.config.load import load_config
    from rec_dist.methods.initial_weights import InitialWeights
    from rec_dist.methods.language_model.ranking import EvaluateJob, evaluate_worker, gather_parts
    from rec_dist.methods.registry import find_initial_weights

    folder.mkdir(parents=True, exist_ok=True)
    config = load_config(run.path / "config.yaml", ["evaluate.max_users=6", *changes])
    saved = run.path / "model"
    job = EvaluateJob(
        config.model_dump(), str(folder), InitialWeights(find_initial_weights(config).model, saved), saved, temperature
    )
    run_workers(evaluate_worker, [job] * workers, folder / "workers")
    return np.stack(list(gather_parts(folder)))


@pytest.mark.parametrize("temperature", [None, 2.0])
def test_any_workers_and_any_packing(trainer: Any, tmp_path: Path, temperature: float | None) -> None:
    run = trainer.once(*_SFT)
    expected = scores(run, tmp_path / "one", temperature=temperature)
    assert expected.shape == (6, 10)
    assert np.isfinite(expected).all()
    for name, workers, changes in (
        ("two", 2, ()),
        ("two-small", 2, ("train.max_tokens_per_micro_batch=100",)),  # splits the candidates of an example over micro-batches
        ("one-small", 1, ("train.max_tokens_per_micro_batch=100",)),
        ("two-sharded", 2, ("train.max_tokens_per_micro_batch=300", "cluster.zero_stage=3")),
    ):
        found = scores(run, tmp_path / name, *changes, workers=workers, temperature=temperature)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_the_whole_catalogue_is_brute_force(
    trainer: Any, tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    """num_candidates=all on the base model: every item outside the history, in the order of plain transformers."""
    from transformers import AutoModelForCausalLM

    from rec_dist.config.schema import PromptConfig
    from rec_dist.data.artifacts.predictions import Predictions
    from rec_dist.data.dataset.prepared_data import PreparedData
    from rec_dist.data.prompts.builder import build_prompt_builder
    from rec_dist.data.prompts.tokens import load_tokenizer

    config = tiny_config(
        tmp_path / "run", "evaluate.num_candidates=all", "evaluate.max_users=3", "train.max_tokens_per_micro_batch=200"
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(config), encoding="utf-8")
    code, child = run_command(tmp_path, "evaluate", path)
    assert code == 0, child.err
    predictions = Predictions.read(tmp_path / "run-base" / "predictions.arrow")
    data = PreparedData.open(tiny_data)
    split = data.split("test")
    builder = build_prompt_builder(PromptConfig(**config["prompt"]), load_tokenizer(tiny_model_dir), data.titles)
    model = AutoModelForCausalLM.from_pretrained(str(tiny_model_dir), dtype=torch.float32).eval()
    for row in range(3):
        items = split.items_of(int(np.searchsorted(split.user_ids, predictions.user_ids[row])))
        history, target = items[:-1], int(items[-1])
        candidates = [item for item in range(data.num_items) if item not in set(history.tolist())]
        assert predictions.candidates[row].tolist() == candidates
        assert int(predictions.targets[row]) == target
        prompt = builder.grouped_prompt(history[-5:], [np.asarray([target], dtype=np.int32)], [0]).tokens.tolist()
        wanted = []
        for item in candidates:
            answer = builder.completion(item).tolist()
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            wanted.append(float(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None]).sum()))
        assert predictions.scores[row].tolist() == pytest.approx(wanted, abs=1e-4)
        rank = sum(value >= wanted[candidates.index(target)] - 1e-5 for value in wanted)
        assert int(predictions.ranks[row]) == rank

    searched = tmp_path / "searched"
    code, child = run_command(tmp_path, "evaluate", path, "evaluate.search=exact", f"evaluate.output_dir={searched}")
    assert code == 0, child.err
    assert "mrr and auc need" in child.err
    found = Predictions.read(searched / "predictions.arrow")
    assert found.ranks.tolist() == predictions.ranks.tolist() and found.rank_limit == 100
    assert [items.tolist() for items in found.candidates] == [items.tolist() for items in predictions.candidates]
    whole, row = (json.loads((folder / "evaluation.json").read_text())["row"] for folder in (tmp_path / "run-base", searched))
    assert row["metrics"] == {name: value for name, value in whole["metrics"].items() if name not in ("mrr", "auc")}
    assert row["rows"] > 0 and row["search"] == "exact"


def test_all_rankers_get_the_same_examples_and_a_second_time_nothing_is_done(
    trainer: Any, tiny_config: Callable[..., dict[str, Any]], tmp_path: Path
) -> None:
    from rec_dist.data.artifacts.predictions import Predictions

    run = trainer.train(tmp_path / "run", *_SFT)
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(run.path)), encoding="utf-8")
    for words in (["evaluate", path], ["evaluate", path, "evaluate.ranker=popularity"], ["evaluate", run.path]):
        code, child = run_command(tmp_path, *words)
        assert (code, "already" in child.err) == (0, False), child.err
    asked = [Predictions.read(tmp_path / name / "predictions.arrow") for name in ("run", "run-base", "run-popularity")]
    for other in asked[1:]:
        assert np.array_equal(asked[0].user_ids, other.user_ids)
        assert np.array_equal(asked[0].targets, other.targets)
        assert all(np.array_equal(a, b) for a, b in zip(asked[0].candidates, other.candidates, strict=True))
        assert not np.array_equal(np.concatenate(asked[0].scores), np.concatenate(other.scores))
    before = run.rows
    table = child.out
    code, child = run_command(tmp_path, "evaluate", run.path)
    assert code == 0
    assert "evaluated already" in child.err
    assert child.out == table
    assert run.rows == before
    # other examples are another evaluation
    code, child = run_command(tmp_path, "evaluate", run.path, "evaluate.num_candidates=5")
    assert (code, "already" in child.err) == (0, False)
    assert json.loads((run.path / "evaluation.json").read_text(encoding="utf-8"))["row"]["num_candidates"] == 5


def test_a_run_on_other_examples_beside_its_own(trainer: Any, tmp_path: Path) -> None:
    """evaluate.output_dir: equal scores in another folder; the run's own evaluation stays."""
    from rec_dist.data.artifacts.predictions import Predictions

    run, other = trainer.train(tmp_path / "run", *_SFT), tmp_path / "elsewhere"
    code, child = run_command(tmp_path, "evaluate", run.path)
    assert code == 0, child.err
    kept = (run.path / "evaluation.json").read_bytes()
    code, child = run_command(tmp_path, "evaluate", run.path, f"evaluate.output_dir={other}")
    assert code == 0, child.err
    assert (run.path / "evaluation.json").read_bytes() == kept
    own, there = (Predictions.read(folder / "predictions.arrow") for folder in (run.path, other))
    np.testing.assert_array_equal(np.concatenate(own.scores), np.concatenate(there.scores))
    code, child = run_command(tmp_path, "evaluate", run.path, "evaluate.ranker=popularity")
    assert code == 2
    assert "evaluate.ranker goes with a CONFIG" in child.err


_SEQUENTIAL = ("task.kind=sequential", "adapter.kind=none", "task.sequential.width=8")


@pytest.mark.parametrize(
    ("settings", "way_out", "elsewhere"),
    [
        (_SFT, "set evaluate.output_dir", 0),
        ((*_SFT, "adapter.kind=none"), "set evaluate.output_dir", 0),
        (_SEQUENTIAL, "its item ids mean other items there; evaluate it on its own", 2),
    ],
    ids=["adapter", "model", "recommender"],
)
def test_results_on_other_data_do_not_replace_the_runs_own(
    trainer: Any, tmp_path: Path, settings: tuple[str, ...], way_out: str, elsewhere: int
) -> None:
    """A language model reads titles, so it can score other data into another folder. A recommender only knows item ids."""
    from rec_dist.config.schema import DataConfig
    from rec_dist.data.prepare.prepare import prepare

    run, few = tmp_path / "run", tmp_path / "few"
    config = trainer.config(run, *settings, "train.max_steps=1")
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    prepare(DataConfig(**{**config["data"], "path": str(few), "max_train_users": 20}))
    for words in (("train", tmp_path / "config.yaml"), ("evaluate", run)):
        code, child = run_command(tmp_path / "out", *words)
        assert code == 0, child.err
    kept = (run / "evaluation.json").read_bytes()
    code, child = run_command(tmp_path / "out", "evaluate", run, f"data.path={few}")
    assert (code, way_out in child.err) == (2, True), child.err
    assert (run / "evaluation.json").read_bytes() == kept
    code, child = run_command(tmp_path / "out", "evaluate", run, f"data.path={few}", f"evaluate.output_dir={tmp_path / 'on-few'}")
    assert (code, (tmp_path / "on-few" / "evaluation.json").is_file()) == (elsewhere, not elsewhere), child.err
