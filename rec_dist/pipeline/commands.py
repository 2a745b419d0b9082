"""The commands as functions: each takes a validated configuration, does one thing and returns what it found."""

import json
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rec_dist.config.load import load_config, to_yaml
from rec_dist.config.paths import absolute, pinned
from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME
from rec_dist.data.prepared.dataset import PreparedData, open_data
from rec_dist.data.prepared.manifest import Manifest
from rec_dist.data.preparing.prepare import prepare as prepare_data
from rec_dist.data.preparing.upload import prepare_remote
from rec_dist.evaluate.language import (
    EvaluateJob,
    build_checked_builder,
    clear_parts,
    evaluate_worker,
    gather_parts,
    questions_of,
)
from rec_dist.evaluate.measure import predictions_of, summarize
from rec_dist.evaluate.protocol import Question
from rec_dist.evaluate.rankers import PopularityRanker, SequentialRanker
from rec_dist.launch.prepare_on_ray import ray_map
from rec_dist.launch.workers import launch
from rec_dist.models.pretrained import resolve_model
from rec_dist.pipeline.train import describe
from rec_dist.pipeline.watch import watching
from rec_dist.report.table import ComparisonRow, text_table
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import fingerprint, is_remote, write_json
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.tasks.recommender import check_catalogue, load_recommender
from rec_dist.tasks.start import Start, trained

Log = Callable[[str], None]


def prepare(config: RunConfig, *, log: Log) -> Manifest:
    """Raw files -> the prepared data set at data.path; kept when it is there already."""
    place = prepare_remote if is_remote(config.data.path) else prepare_data
    return place(config.data, log=log, ray_map=lambda: ray_map(config.cluster.address))


def evaluate(target: Path, overrides: Sequence[str], *, log: Log) -> dict[str, Any]:
    """Ranks on a split and writes predictions.arrow, a row of metrics.jsonl and a printed table. Returns that row.

    target: a finished run directory, or a CONFIG for its base model (evaluate.ranker=popularity: for the popularity floor).
    An evaluation that is there already, with the same questions and the same model, is kept.
    """
    config, run, start, saved = _evaluation_target(target, overrides)
    own = run.model == saved  # else the results lie apart from the run that trained, or no run did
    data = open_data(config.data)
    questions = questions_of(config, data)
    with run.locked() if own else run.claimed(config.model_dump(mode="json"), to_yaml(config)):
        prints = start.fingerprints()
        if not own:
            describe(run, data=data.manifest.fingerprint, model=prints["model"])
        key = _evaluation_key(config, data, prints)
        row = _kept(run, key)
        if row is not None:
            log(f"{run.path} is evaluated already; nothing to do")
        else:
            began = time.perf_counter()
            with watching(run):
                scores, cost = _answer(config, data, questions, start, saved, run)
            predictions = predictions_of(questions, scores)
            run.evaluation.unlink(missing_ok=True)  # it must never describe other predictions
            predictions.write(run.path / PREDICTIONS_NAME)
            row = {
                "event": "evaluation",
                "name": run.path.name,
                "split": config.evaluate.split,
                "num_candidates": config.evaluate.num_candidates,
                "seconds": time.perf_counter() - began,
                **cost,
                "metrics": summarize(predictions, seed=config.evaluate.seed),
            }
            run.append(row)
            write_json(run.evaluation, {"key": key, "row": row})
    print(text_table([ComparisonRow(run.path.name, row["metrics"])]), flush=True)
    return row


def _evaluation_target(target: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunDirectory, Start, Path | None]:
    """(configuration, where results go, what to score with, the saved model's folder or None for a base model)."""
    if target.is_dir():
        config, run = finished_run(target, overrides)
        if config.evaluate.ranker != "model":
            raise UserError("evaluate.ranker goes with a CONFIG; a run directory is ranked by its own model")
        own = config.evaluate.output_dir
        results = run if own is None else RunDirectory(absolute(own), key="evaluate.output_dir")
        return config, results, trained_start(config, run.model), run.model
    config = pinned(load_config(target, overrides))
    results = RunDirectory(base_results_dir(config), key="evaluate.output_dir")
    if config.evaluate.ranker == "popularity":
        return config, results, Start(Path()), None
    if config.task.kind == "sequential":
        raise UserError(
            "task.kind=sequential has no base model; train it and give its run directory, or set evaluate.ranker=popularity"
        )
    return config, results, Start(resolve_model(config.model.path)), None


def finished_run(target: Path, overrides: Sequence[str]) -> tuple[RunConfig, RunDirectory]:
    """The run in the folder `target` with its configuration, changed by `overrides`. UserError: no run, or none with a model."""
    run = RunDirectory(absolute(str(target)))
    if not run.config_path.is_file():
        raise UserError(
            f"{target} is no run directory (config.yaml is missing); give one that `rec-dist train` wrote, or a CONFIG"
        )
    config = pinned(load_config(run.config_path, overrides))
    if run.finished() is None:
        raise UserError(f"{target} is not finished, so it has no model yet; run `rec-dist train` on it to the end")
    if not any(run.model.glob("*.safetensors")):
        raise UserError(f"{run.model} holds no weights; remove finished.json and run `rec-dist train` again, to the same end")
    return config, run


def base_results_dir(config: RunConfig) -> Path:
    """Where the evaluation of a CONFIG (its base model, or a floor without one) goes."""
    suffix = "popularity" if config.evaluate.ranker == "popularity" else "base"
    return absolute(config.evaluate.output_dir or f"{config.train.run_dir}-{suffix}")


def trained_start(config: RunConfig, saved: Path) -> Start:
    """The model that a finished run has left in `saved`."""
    if config.task.kind == "sequential" or config.adapter.kind == "none":
        return Start(saved)
    return trained(saved, resolve_model(config.model.path))


def _evaluation_key(config: RunConfig, data: PreparedData, prints: dict[str, str | None]) -> str:
    settings = config.evaluate.model_dump(exclude={"output_dir"})
    weights = list(prints.values())
    return fingerprint([*weights, data.manifest.fingerprint, settings, config.prompt.model_dump(), config.model.dtype])


def _kept(run: RunDirectory, key: str) -> dict[str, Any] | None:
    if not run.evaluation.is_file() or not (run.path / PREDICTIONS_NAME).is_file():
        return None
    try:
        value = json.loads(run.evaluation.read_text(encoding="utf-8"))
        return dict(value["row"]) if value["key"] == key else None
    except (ValueError, TypeError, KeyError):  # damaged: measured again
        return None


def _answer(
    config: RunConfig, data: PreparedData, questions: list[Question], start: Start, saved: Path | None, run: RunDirectory
) -> tuple[list[Any], dict[str, Any]]:
    """(scores of each question's candidates, what it cost)."""
    histories, candidates = [q.history for q in questions], [q.candidates for q in questions]
    if saved is None and config.evaluate.ranker == "popularity":
        return PopularityRanker(data.train_counts).score(histories, candidates), {}
    if config.task.kind == "sequential":
        model = load_recommender(start.model)
        check_catalogue(start.model, data)
        return SequentialRanker(model).score(histories, candidates), {}
    job = EvaluateJob(config.model_dump(), str(run.path), start, saved)
    build_checked_builder(config, job, data)  # refused here, before a worker is started
    clear_parts(run.path)
    cost = launch(evaluate_worker, job, config.cluster, run)
    merged = gather_parts(run.path)
    return [values[: len(c)] for values, c in zip(merged, candidates, strict=True)], cost
