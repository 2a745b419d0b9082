"""`rec-dist evaluate`: ranks on a split with a finished run, or with the base model of a configuration.

An evaluation that is there already is kept.
"""

import json
import logging
import time
from functools import partial
from pathlib import Path
from typing import Any

from rec_dist.commands.dtype import difference, saved_dtype, settle_dtype
from rec_dist.commands.progress import logging_lines, watching
from rec_dist.commands.train import describe
from rec_dist.config.load import ConfigLike, load_config, load_saved
from rec_dist.config.overrides import Overrides
from rec_dist.config.paths import absolute, pinned
from rec_dist.config.references import recorded
from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions, writing_predictions
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import predictions_in_blocks, score_in_blocks, summarize, summarize_parts
from rec_dist.evaluation.questions import QuestionFile
from rec_dist.launch.workers import launch
from rec_dist.methods.eval_examples import eval_examples_of, left_out_users, question_file
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch, ScoreStream
from rec_dist.methods.registry import check_workers_find, method_of
from rec_dist.report.table import ComparisonRow, seen_of
from rec_dist.report.text_table import text_table
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import fingerprint, read_object, write_json
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

_FORM = 2  # of predictions.arrow and of the row: an evaluation of an earlier form is made again


def evaluate(
    target: ConfigLike, overrides: Overrides = (), *, progress: bool = True, owns_process: bool = True
) -> dict[str, Any]:
    """Ranks on a split, writes predictions.arrow and a row of metrics.jsonl, and returns that row.

    target: a finished run directory, or a configuration for its base model (evaluate.ranker=popularity: for that baseline).
    Keeps an evaluation that is there already, with the same examples and the same model.
    progress: shows it on standard error; else the lines of its log go to `logging`. owns_process: as launch takes it.
    """
    config, run, initial, saved = _evaluation_target(target, overrides)
    own = run.model == saved  # else the results lie apart from the run that trained, or no run did
    config = _with_dtype(config, run, saved)
    data = open_data(config.data)
    if saved is not None:
        method_of(config).ranker.check(saved, data)
        _check_own_results(data, saved, run)
    check_corrections(config, saved)
    asked, examples = question_file(config), eval_examples_of(config, data)
    left_out = left_out_users(config, data, examples)
    if left_out:
        logger.info(f"evaluate.negatives=low_rated: {left_out:,} users have no item that they rated low, or training has seen it")
    with run.locked() if own else run.claimed(*recorded(config)):
        prints = initial.fingerprints()
        if not own:
            describe(run, data=data.manifest.fingerprint, model=prints["model"], folder=initial.model)
        key = _evaluation_key(config, data, prints, asked)
        row = _kept(run, key)
        if row is not None:
            logger.info(f"{run.path} is evaluated already; nothing to do")
        else:
            began = time.perf_counter()
            launcher = partial(launch, owns_process=owns_process)
            with watching(run, hang_seconds=config.cluster.hang_seconds) if progress else logging_lines(run):
                scores, cost = _score(Evaluation(config, data, examples, initial, saved, run), launcher)
                with writing_predictions(run.path / PREDICTIONS_NAME) as add:
                    for block in predictions_in_blocks(examples, scores, data.train_counts):
                        add(block)
                    if question_file(config) != asked:
                        raise UserError(
                            f"evaluate.questions ({config.evaluate.questions}) changed meanwhile; run the same command again"
                        )
                    run.evaluation.unlink(missing_ok=True)  # it must not describe other predictions
            predictions = Predictions.read(run.path / PREDICTIONS_NAME)
            row = {
                "event": "evaluation",
                "name": run.path.name,
                **_protocol(config, asked, examples),
                **({} if left_out is None else {"left_out_users": left_out}),
                **_dtype_of(config),
                "seconds": time.perf_counter() - began,
                **cost,
                "metrics": summarize(predictions, seed=config.evaluate.seed),
                "parts": summarize_parts(predictions, seed=config.evaluate.seed),
            }
            run.append(row)
            write_json(run.evaluation, {"key": key, "row": row})
    return {**row, "name": run.path.name}


def _dtype_of(config: RunConfig) -> dict[str, str]:
    """What a language model computed in; nothing for recommenders, which are float32, and for the popularity baseline."""
    language_model = config.evaluate.ranker == "model" and method_of(config).ranker.language_model
    return {"dtype": config.model.dtype} if language_model else {}


def _protocol(config: RunConfig, asked: QuestionFile | None, examples: list[EvalExample]) -> dict[str, Any]:
    """What was asked, for the row. num_candidates: "low_rated", or "given" if a file brought candidates of various numbers."""
    settings = config.evaluate
    if asked is None:
        source: dict[str, Any] = {"split": settings.split, "targets": settings.targets}
    else:
        source = {"questions": asked.path.name, "questions_fingerprint": asked.fingerprint}
    if not examples[0].given:
        return {**source, "num_candidates": settings.num_candidates, "exclude_seen": settings.exclude_seen}
    if settings.negatives == "low_rated":
        return {**source, "num_candidates": "low_rated", "exclude_seen": None}
    sizes = {len(example.candidates) for example in examples}
    return {**source, "num_candidates": sizes.pop() if len(sizes) == 1 else "given", "exclude_seen": None}


def table_of(row: dict[str, Any]) -> str:
    """The row of an evaluation as the table that the command prints."""
    facts = {"dtype": row.get("dtype"), "seen": seen_of(row), "parts": row["parts"], "recall": row.get("recall")}
    return text_table([ComparisonRow(row["name"], row["metrics"], **facts)])


def _evaluation_target(target: ConfigLike, overrides: Overrides) -> tuple[RunConfig, RunDirectory, InitialWeights, Path | None]:
    """(configuration, where results go, what to score with, the saved model's folder or None for a base model)."""
    if isinstance(target, str | Path) and Path(target).is_dir():
        config, run = finished_run(Path(target), overrides)
        if config.evaluate.ranker != "model":
            raise UserError("evaluate.ranker goes with a CONFIG; a run directory is ranked by its own model")
        own = config.evaluate.output_dir
        results = run if own is None else _results(absolute(own))
        return config, results, method_of(config).ranker.weights(config, run.model), run.model
    config = pinned(load_config(target, overrides))
    results = _results(base_results_dir(config))
    if config.evaluate.ranker == "popularity":
        return config, results, InitialWeights(Path()), None
    return config, results, method_of(config).ranker.weights(config, None), None


def _with_dtype(config: RunConfig, run: RunDirectory, saved: Path | None) -> RunConfig:
    """The configuration without model.dtype=auto. Says how the dtype was chosen, and whether the run was trained in another."""
    if config.evaluate.ranker != "model":
        return config
    trained = saved.parent if saved is not None else run.path
    config, lines = settle_dtype(config, saved_dtype(trained))
    if saved is not None:
        lines += difference(config, trained, "the run")
    for line in lines:
        logger.info(line)
    return config


def _check_own_results(data: PreparedData, saved: Path, run: RunDirectory) -> None:
    """Raises UserError for other data than the run was trained on, if the results would replace the run's own."""
    trained_on = run.path / "inputs.json"
    if run.model != saved or not trained_on.is_file():
        return
    if read_object(trained_on, "set evaluate.output_dir").get("data") != data.manifest.fingerprint:
        raise UserError(
            f"data.path ({data.location}) holds other data than {run.path} was trained on; set evaluate.output_dir to a folder for "
            "these results, so that they do not replace the run's own"
        )


def check_corrections(config: RunConfig, saved: Path | None) -> None:
    """Raises UserError for a correction of scores that are no log-likelihoods of titles."""
    settings, ranker = config.evaluate, method_of(config).ranker
    if settings.ranker == "model" and settings.corrects and not (ranker.language_model and ranker.scores_titles(saved)):
        raise UserError(
            f"evaluate.title_prior and evaluate.length_power have no effect on task.kind={config.task.kind}, which scores no titles; "
            "remove them"
        )


def _score(evaluation: Evaluation, launcher: Launch) -> tuple[ScoreStream, dict[str, Any]]:
    """The scores of each example's candidates, and what they cost."""
    config, examples = evaluation.config, evaluation.examples
    if evaluation.saved is None and config.evaluate.ranker == "popularity":
        return score_in_blocks(PopularityScorer(evaluation.data.train_counts), examples), {}
    check_workers_find(config)
    evaluation.initial.check_model()
    return method_of(config).ranker.score(evaluation, launcher)


def _results(folder: Path) -> RunDirectory:
    """A folder for results apart from the run that trained. Raises UserError when they cannot be written there."""
    check_output(folder, "evaluate.output_dir", folder=True, may_exist=True)
    return RunDirectory(folder, key="evaluate.output_dir")


def finished_run(target: Path, overrides: Overrides) -> tuple[RunConfig, RunDirectory]:
    """The run in the folder `target`, with its configuration changed by `overrides`.

    Raises UserError when no run is there, or it has no model.
    """
    run = RunDirectory(absolute(str(target)))
    if not run.config_path.is_file():
        raise UserError(
            f"{target} is no run directory (config.yaml is missing); give one that `rec-dist train` wrote, or a CONFIG"
        )
    config = pinned(load_saved(run.config_path, overrides))
    if run.finished() is None:
        raise UserError(f"{target} is not finished, so it has no model yet; run `rec-dist train` on it to the end")
    if not any(run.model.glob("*.safetensors")):
        raise UserError(f"{run.model} holds no weights; remove finished.json and run `rec-dist train` again, to the same end")
    return config, run


def base_results_dir(config: RunConfig) -> Path:
    """Where the evaluation of a configuration (of its base model, or of a baseline) goes."""
    suffix = "popularity" if config.evaluate.ranker == "popularity" else "base"
    return absolute(config.evaluate.output_dir or f"{config.train.run_dir}-{suffix}")


def _evaluation_key(config: RunConfig, data: PreparedData, prints: dict[str, str | None], asked: QuestionFile | None) -> str:
    settings = config.evaluate.model_dump(exclude={"output_dir", "questions"})
    if asked is not None:
        settings["questions"] = asked.fingerprint
    weights, own = list(prints.values()), method_of(config).section
    section = None if own is None else config.task.section(own[1])  # a method's ranker may read it
    of_method = [] if section is None else [section.without_paths()]
    prompt = config.prompt.model_dump()
    code = ["trust_remote_code"] if config.model.trust_remote_code else []  # another class may compute with the same weights
    return fingerprint([_FORM, *weights, data.manifest.fingerprint, settings, prompt, config.model.dtype, *of_method, *code])


def _kept(run: RunDirectory, key: str) -> dict[str, Any] | None:
    if not run.evaluation.is_file() or not (run.path / PREDICTIONS_NAME).is_file():
        return None
    try:
        value = json.loads(run.evaluation.read_text(encoding="utf-8"))
        return dict(value["row"]) if value["key"] == key else None
    except (ValueError, TypeError, KeyError):  # damaged: measured again
        return None
