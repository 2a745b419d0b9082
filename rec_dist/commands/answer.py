"""How each kind of model answers the questions of an evaluation, and on which data a saved one may: the same rule for all."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import PopularityRanker
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.ranking import EvaluateJob, build_checked_builder, clear_parts, evaluate_worker, gather_parts
from rec_dist.methods.sequential.ranking import SequentialRanker
from rec_dist.methods.sequential.saved_model import check_catalogue, load_recommender
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import read_object


def check_data(config: RunConfig, data: PreparedData, saved: Path | None, run: RunDirectory) -> None:
    """UserError: data on which the model in `saved` has no answers, or whose results would lie in its own run, where nothing says so.

    saved: None for what nothing was trained for, the base model and popularity. run: where results go.
    """
    if saved is None:
        return
    if config.task.kind == "sequential":
        check_catalogue(saved, data)
    trained_on = run.path / "inputs.json"
    if run.model != saved or not trained_on.is_file():
        return
    if read_object(trained_on, "set evaluate.output_dir").get("data") != data.manifest.fingerprint:
        raise UserError(
            f"data.path ({data.location}) holds other data than {run.path} was trained on; set evaluate.output_dir to a folder for "
            "these results, so that they do not replace the run's own"
        )


def answer(
    config: RunConfig,
    data: PreparedData,
    examples: list[EvalExample],
    initial: InitialWeights,
    saved: Path | None,
    run: RunDirectory,
    launch: Callable[..., dict[str, Any]],
) -> tuple[list[Any], dict[str, Any]]:
    """(scores of each example's candidates, what it cost)."""
    initial.check_model()
    histories, candidates = [e.history for e in examples], [e.candidates for e in examples]
    if saved is None and config.evaluate.ranker == "popularity":
        return PopularityRanker(data.train_counts).score(histories, candidates), {}
    if config.task.kind == "sequential":
        return SequentialRanker(load_recommender(initial.model)).score(histories, candidates), {}
    job = EvaluateJob(config.model_dump(), str(run.path), initial, saved)
    build_checked_builder(config, job, data)  # refused here, before a worker is started
    clear_parts(run.path)
    cost = launch(evaluate_worker, job, config.cluster, run)
    merged = gather_parts(run.path)
    return [values[: len(c)] for values, c in zip(merged, candidates, strict=True)], cost
