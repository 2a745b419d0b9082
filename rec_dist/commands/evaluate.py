"""`rec-dist evaluate`: ranks on a split with a finished run, or with the base model of a configuration.

An evaluation that is there already is kept.
"""

import json
import logging
import time
from collections.abc import Iterator
from functools import partial
from typing import Any

from rec_dist.commands.progress import logging_lines, watching
from rec_dist.commands.target import Target, base_results_dir, open_target, read_target
from rec_dist.commands.train import describe
from rec_dist.config.load import ConfigLike
from rec_dist.config.overrides import Overrides
from rec_dist.config.references import recorded
from rec_dist.config.schema import RunConfig
from rec_dist.data.artifacts.predictions import PREDICTIONS_NAME, Predictions, writing_predictions
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.evaluation.examples import EvalExamples
from rec_dist.evaluation.measure import predictions_in_blocks, ranked_in_blocks, score_in_blocks, summarize, summarize_parts
from rec_dist.evaluation.questions import QuestionFile
from rec_dist.launch.workers import launch
from rec_dist.methods.eval_examples import eval_examples_of, left_out_users, question_file
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.methods.registry import check_workers_find, method_of
from rec_dist.methods.searched_ranks import RANK_LIMIT, check_search, searched_ranks
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
    Keeps an evaluation that is there already, with the same examples and the same model. Questions are made, scored and written in
    blocks: a few numbers of each are held.
    progress: shows it on standard error; else the lines of its log go to `logging`. owns_process: as launch takes it.
    """
    settings, trained = read_target(target, overrides)
    run = _results(settings, trained)
    named = open_target(settings, trained)
    _check_own_results(named, run)
    config, data, initial = named.config, named.data, named.initial
    asked, examples = question_file(config), eval_examples_of(config, data)
    left_out = left_out_users(config, data, examples)
    if left_out:
        logger.info(f"evaluate.negatives=low_rated: {left_out:,} users have no item that they rated low, or training has seen it")
    evaluation = Evaluation(config, data, examples, initial, named.saved, run)
    if config.evaluate.search == "exact":
        check_search(evaluation)
    own = run.model == named.saved  # else the results lie apart from the run that trained, or no run did
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
                blocks, cost = _predictions(evaluation, launcher)
                limit = RANK_LIMIT if config.evaluate.search == "exact" else None
                with writing_predictions(run.path / PREDICTIONS_NAME, rank_limit=limit) as add:
                    for block in _with_progress(blocks, run, len(examples)):
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


def _protocol(config: RunConfig, asked: QuestionFile | None, examples: EvalExamples) -> dict[str, Any]:
    """What was asked, for the row. num_candidates: "low_rated", or "given" if a file brought candidates of various numbers."""
    settings = config.evaluate
    if asked is None:
        source: dict[str, Any] = {"split": settings.split, "targets": settings.targets}
    else:
        source = {"questions": asked.path.name, "questions_fingerprint": asked.fingerprint}
    if settings.search == "exact":
        source |= {"search": "exact", "rank_limit": RANK_LIMIT}
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


def _results(config: RunConfig, trained: RunDirectory | None) -> RunDirectory:
    """The folder of the results. Raises UserError if they cannot be written there."""
    if trained is not None and config.evaluate.ranker != "model":
        raise UserError("evaluate.ranker goes with a CONFIG; a run directory is ranked by its own model")
    if trained is not None and config.evaluate.output_dir is None:
        return trained
    folder = base_results_dir(config)
    check_output(folder, "evaluate.output_dir", folder=True, may_exist=True)
    return RunDirectory(folder, key="evaluate.output_dir")


def _check_own_results(named: Target, run: RunDirectory) -> None:
    """Raises UserError if results in `run` would replace those of other data."""
    trained_on = run.path / "inputs.json"
    if run.model == named.saved and trained_on.is_file():
        data = read_object(trained_on, "set evaluate.output_dir").get("data")
        if data != named.data.manifest.fingerprint:
            raise UserError(
                f"data.path ({named.data.location}) holds other data than {run.path} was trained on; set evaluate.output_dir to a "
                "folder for these results, so that they do not replace the run's own"
            )


def _predictions(evaluation: Evaluation, launcher: Launch) -> tuple[Iterator[Predictions], dict[str, Any]]:
    """What is kept of each question, block by block, and what it cost, which is complete after the last block."""
    config, examples, counts = evaluation.config, evaluation.examples, evaluation.data.train_counts
    if config.evaluate.ranker == "popularity":
        return predictions_in_blocks(examples, score_in_blocks(PopularityScorer(counts), examples), counts), {}
    check_workers_find(config)
    evaluation.initial.check_model()
    if config.evaluate.search == "exact":
        ranks, cost = searched_ranks(evaluation, launcher)
        return ranked_in_blocks(examples, ranks, counts, limit=RANK_LIMIT), cost
    scores, cost = method_of(config).ranker.score(evaluation, launcher)
    return predictions_in_blocks(examples, scores, counts), cost


def _with_progress(blocks: Iterator[Predictions], run: RunDirectory, total: int) -> Iterator[Predictions]:
    """The blocks, with a report of each: recommenders score them as they come, and cluster.hang_seconds would end a silent process."""
    done = 0
    for block in blocks:
        yield block
        done += len(block.ranks)
        run.progress("evaluate", done, total)


def _evaluation_key(config: RunConfig, data: PreparedData, prints: dict[str, str | None], asked: QuestionFile | None) -> str:
    searched = {"search"} if config.evaluate.search == "all" else set[str]()
    settings = config.evaluate.model_dump(exclude={"output_dir", "questions", *searched})
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
