"""The ranks of targets in the whole catalogue by search (evaluate.search=exact), in place of scores of every title.

A search (ranking/search.py) counts the items that score at least as high as the target. Up to RANK_LIMIT the rank is exact;
beyond, it is known to be beyond, and the search ends.
Cost: each worker holds the whole model and takes every Nth question. A question runs the prompt, the target's title, and the
nodes of the trie whose bound reaches the target's score.
"""

from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.engine import process_group
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.methods.registry import method_of
from rec_dist.ranking.search import SearchScorer
from rec_dist.runtime.heartbeat import reporting
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.world import World

RANK_LIMIT = 100


@dataclass(frozen=True)
class SearchJob:
    """What the driver sends to each worker. Fields as in EvaluateJob (methods/language_model/ranking.py)."""

    config: dict[str, Any]
    output_dir: str
    initial: InitialWeights
    saved: Path | None


def check_search(evaluation: Evaluation) -> None:
    """Raises UserError where evaluate.search=exact has no effect, or something else is asked than ranks in the catalogue."""
    config, settings = evaluation.config, evaluation.config.evaluate
    if settings.ranker != "model" or not method_of(config).ranker.scores_titles(evaluation.saved):
        raise UserError(
            "evaluate.search=exact is for language models that score titles; this one scores the catalogue at once, so leave it out"
        )
    if settings.corrects:
        raise UserError(
            "evaluate.search=exact cannot search corrected scores; set evaluate.title_prior=0 and evaluate.length_power=0, or leave "
            "it out"
        )
    if settings.num_candidates != "all" or evaluation.examples[0].given:
        raise UserError(
            f"evaluate.search=exact ranks the whole catalogue, and evaluate.num_candidates ({settings.num_candidates}) or "
            "evaluate.questions gives candidates; set evaluate.num_candidates=all, or leave evaluate.search out"
        )
    if config.prompt.candidates == "listed":
        raise UserError(
            "evaluate.search=exact cannot search with prompt.candidates=listed, which shows candidates in the prompt; leave it out"
        )


def searched_ranks(evaluation: Evaluation, launch: Launch) -> tuple[Iterator[int | None], dict[str, Any]]:
    """The rank of each example's target, None beyond RANK_LIMIT, and the rows of the model that it took behind the prompts."""
    config, folder = evaluation.config, evaluation.run.path
    for path in folder.glob(".ranks-*.npy"):  # of an evaluation that was cut short
        path.unlink()
    cost = launch(
        search_worker,
        SearchJob(config.model_dump(), str(folder), evaluation.initial, evaluation.saved),
        config.cluster,
        evaluation.run,
    )
    paths = sorted(folder.glob(".ranks-*.npy"))
    parts = [np.load(path) for path in paths]  # (2, n) each: ranks, 0 beyond the limit, and rows
    for path in paths:
        path.unlink()
    found = np.zeros(len(evaluation.examples), dtype=np.int64)
    for rank, part in enumerate(parts):
        found[rank :: len(parts)] = part[0]
    beyond = int((found == 0).sum())
    evaluation.run.log(
        f"evaluate.search=exact: {beyond:,} of {len(found):,} targets rank beyond {RANK_LIMIT}; mrr and auc need their ranks and are "
        "not measured"
    )
    ranks = (rank or None for rank in found.tolist())
    return ranks, {**cost, "rows": int(sum(part[1].sum() for part in parts))}


def search_worker(world: World, job: SearchJob) -> dict[str, Any]:
    """Writes the ranks of this worker's share to a part file."""
    with process_group.joined(world):
        config, run = RunConfig.model_validate(job.config), RunDirectory(Path(job.output_dir))
        data = open_data(config.data)
        examples, ranker = eval_examples_of(config, data), method_of(config).ranker
        ranks, rows = array("q"), array("q")
        with (
            ranker.scoring(config, data, job.initial, job.saved, world.device) as scorer,
            reporting(run, world, "evaluate") as report,
        ):
            for number in range(world.rank, len(examples), world.size):
                rank, cost = rank_in_catalogue(scorer, examples[number], data, exclude_seen=config.evaluate.exclude_seen)
                ranks.append(rank or 0)
                rows.append(cost)
                report(number + 1, len(examples))
        np.save(run.path / f".ranks-{world.rank:05d}.npy", np.asarray([ranks, rows], dtype=np.int64))
    return {}


def rank_in_catalogue(
    scorer: CandidateScorer, example: EvalExample, data: PreparedData, *, exclude_seen: bool, limit: int = RANK_LIMIT
) -> tuple[int | None, int]:
    """The rank of the target among all items, None beyond the limit, and the rows of the model that the search ran.

    exclude_seen: without the items of the history, except for the target. Raises UserError for a scorer that cannot search.
    """
    if not isinstance(scorer, SearchScorer):
        raise UserError(
            "evaluate.search=exact needs a scorer that searches titles, and this run's ranker has one that does not; leave it out"
        )
    prior = np.zeros(data.num_items)
    if exclude_seen:
        prior[example.history] = -np.inf
        prior[example.target] = 0.0
    found = scorer.search(example.history, prior=prior).rank_of(example.target, limit=limit)
    assert found.certified, "without max_rows a search runs to its end"
    return found.rank, found.rows
