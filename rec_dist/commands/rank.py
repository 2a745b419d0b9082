"""`rec-dist rank`: the best items for each user, with a finished run, a base model or popularity. Users are read, scored and
written in blocks, so memory does not grow with their number. The scorer runs in this process, or on the workers of a Ray cluster.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

from rec_dist.commands.progress import logging_lines, watching
from rec_dist.commands.rank_request import RankOptions, RankRequest, check_options, read_request
from rec_dist.commands.ranked_model import ElsewhereModel, RankedModel, ranked_model, with_new_items
from rec_dist.config.load import ConfigLike
from rec_dist.config.overrides import Overrides
from rec_dist.data.artifacts.recommendations import ItemColumns, RecordBatch
from rec_dist.data.artifacts.user_blocks import TravellingUsers
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, PopularityScorer
from rec_dist.methods.registry import check_workers_find
from rec_dist.ranking.candidates import GivenLists
from rec_dist.ranking.rank import Counts, Ranked, Wanted, rank_block, rank_users
from rec_dist.ranking.search import Score, SearchScorer
from rec_dist.ranking.unfinished import Unfinished, is_done, unfinished
from rec_dist.ranking.users import UserBlock
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import writing

logger = logging.getLogger(__name__)

Blocks = Callable[[int], Iterator[tuple[RecordBatch, Counts]]]


def rank(
    target: ConfigLike,
    overrides: Overrides = (),
    *,
    options: RankOptions,
    output: Path | None,
    write: Callable[[RecordBatch], None] | None = None,
    progress: bool = True,
) -> Counts:
    """Writes the lists of all users to `output`, or gives them to `write` block by block.

    target: a finished run directory, or a configuration for its base model (evaluate.ranker=popularity: for that order). A
    ranking that was stopped continues. Raises UserError, before anything is written, for any input that cannot be read.
    """
    check_options(options, output)
    model = with_new_items(ranked_model(target, overrides), options.items)
    with ExitStack() as stack:
        request = read_request(model, options, stack)
        key, hang_seconds = {**model.identity, **request.identity}, model.config.cluster.hang_seconds
        if output is None:
            assert write is not None
            counts = _stream(model, request, write, progress)
        elif is_done(output, key):
            logger.info(f"{output} is ranked already; nothing to do")
            return Counts()
        else:
            with unfinished(output, key) as parts, writing(output):
                counts = rank_to_parts(
                    lambda start: _blocks(model, request, start), request.users.total, parts, progress, hang_seconds
                )
        _report(counts, request, output)
        return counts


def _blocks(model: RankedModel, request: RankRequest, start: int) -> Iterator[tuple[RecordBatch, Counts]]:
    """The lists of each block of users from user `start` on."""
    if request.launcher == "local":
        columns, popularity = ItemColumns(model.data.raw_items, model.data.titles), PopularityScorer(model.data.train_counts)
        with model.scorer() as loaded:
            scorer = _asked_for(loaded, request.score, request.wanted)
            for ranked in rank_users(request.users, scorer, popularity, request.wanted, size=request.size, start=start):
                yield _batch(columns, ranked), ranked.counts
        return
    from rec_dist.launch.rank_on_ray import ranked_on_ray

    check_workers_find(model.config)
    lists, wanted = request.wanted.candidates, replace(request.wanted, candidates=None)
    blocks = (
        TravellingUsers(
            number, each.unknown, each.users, each.histories, lists.of(each.users) if lists else [None] * len(each.users)
        )
        for number, each in enumerate(request.users.blocks(request.size, start))
    )
    load = partial(_in_worker, model.elsewhere, wanted, request.score, lists is not None)
    yield from ranked_on_ray(load, blocks, model.config.cluster)


@contextmanager
def _in_worker(
    model: ElsewhereModel, wanted: Wanted, score: Score | None, listed: bool, device: str
) -> Iterator[Callable[[TravellingUsers], tuple[RecordBatch, Counts]]]:
    """In a worker of Ray: what ranks a block. listed: whether users bring their candidates."""
    data, scoring = model.load(device)
    columns, popularity = ItemColumns(data.raw_items, data.titles), PopularityScorer(data.train_counts)
    with scoring as loaded:
        scorer = _asked_for(loaded, score, wanted)

        def rank_one(block: TravellingUsers) -> tuple[RecordBatch, Counts]:
            lists = GivenLists(block.users, block.candidates) if listed else None
            users = UserBlock(block.users, block.histories, block.unknown)
            ranked = rank_block(users, lists, scorer, popularity, wanted)
            return _batch(columns, ranked), ranked.counts

        yield rank_one


def _batch(columns: ItemColumns, ranked: Ranked) -> RecordBatch:
    return columns.batch(ranked.users, ranked.user, ranked.rank, ranked.item, ranked.score, ranked.fallback, ranked.more)


def _asked_for(scorer: CandidateScorer, score: Score | None, wanted: Wanted) -> CandidateScorer:
    """The scorer with the score that was asked for. Raises UserError if it has no such score, or cannot search."""
    if score is None and wanted.search is None:
        return scorer
    if not isinstance(scorer, SearchScorer):
        raise UserError(
            "--search and --score need a scorer that searches titles, and this run's ranker has one of its own that does not; leave "
            "them out"
        )
    return scorer if score is None else scorer.scoring_by(score)


def rank_to_parts(
    blocks: Blocks,
    total: int,
    parts: Unfinished,
    progress: bool,
    hang_seconds: float,
    *,
    then: Callable[[], None] | None = None,
) -> Counts:
    """Ranks those of `total` users who are in no part yet, and joins the parts to their output.

    blocks: gives the rows of all users from a number on, block by block. then: as in Unfinished.finish.
    """
    done = parts.start
    if done:
        logger.info(f"{done:,} of {total:,} users are ranked already")
    if done < total:
        with _watched(RunDirectory(parts.folder), total, done, progress, hang_seconds) as report:
            for batch, counts in blocks(done):
                parts.add(batch, counts)
                report(counts.users)
    parts.finish(then)
    return parts.counts


def _stream(model: RankedModel, request: RankRequest, write: Callable[[RecordBatch], None], progress: bool) -> Counts:
    counts = Counts()
    with (
        tempfile.TemporaryDirectory(prefix="rec-dist-rank-") as folder,
        _watched(RunDirectory(Path(folder)), request.users.total, 0, progress, model.config.cluster.hang_seconds) as report,
    ):
        for batch, of_block in _blocks(model, request, 0):
            write(batch)
            counts = counts.plus(of_block)
            report(of_block.users)
    return counts


@contextmanager
def _watched(run: RunDirectory, total: int, start: int, progress: bool, hang_seconds: float) -> Iterator[Callable[[int], None]]:
    """Shows a bar or lines. The function that it gives takes the number of users of each block."""
    began, done = time.monotonic(), start

    def report(users: int) -> None:
        nonlocal done
        done += users
        rate = (done - start) / max(time.monotonic() - began, 1e-9)
        run.progress("rank", done, total, f"{rate:,.3g} users/s", (total - done) / rate)

    with watching(run, hang_seconds=hang_seconds) if progress else logging_lines(run):
        yield report


def _report(counts: Counts, request: RankRequest, output: Path | None) -> None:
    """One line for each thing that somebody may want to know."""
    logger.info(f"{counts.users:,} users ranked{f' in {output}' if output is not None else ''}")
    search = request.wanted.search
    within = "" if search is None or search.max_rows is None else ", or --max-rows ended the search before the first title"
    lines = [
        (counts.unknown, "items of histories are not in the catalogue and were skipped"),
        (counts.fallback, "users have no known item and got the order of popularity (column fallback)"),
        (counts.without_candidates, "users have no list of candidates and were left out"),
        (counts.empty, f"users have no item left to recommend{within}"),
        (counts.uncertified, "users have a list that may lack a better item (column certified)"),
    ]
    lists = request.wanted.candidates
    if lists is not None:
        lines.append((lists.users - counts.users + counts.without_candidates, "lists of candidates belong to no user"))
    for number, what in lines:
        if number > 0:
            logger.warning(f"{number:,} {what}")
