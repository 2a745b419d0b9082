"""`rec-dist rank`: the best items for each user, with a finished run, a base model or popularity. Users are read, scored and
written in blocks, so memory does not grow with their number.

The scorer runs in this process. What a scorer of another kind would need (a search over the whole catalogue of a language model)
stands in the place of ranking.rank.rank_users.
"""

import logging
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rec_dist.commands.progress import logging_lines, watching
from rec_dist.commands.ranked_model import RankedModel, ranked_model
from rec_dist.config.load import ConfigLike
from rec_dist.config.overrides import Overrides
from rec_dist.data.artifacts.recommendations import OUTPUT_SUFFIXES, ItemColumns, RecordBatch
from rec_dist.data.sources.listings import Listing, as_names, as_user, read_listings
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import PopularityScorer
from rec_dist.ranking.candidates import CandidateLists
from rec_dist.ranking.catalogue import ItemNames, item_pool, read_names
from rec_dist.ranking.rank import Counts, Wanted, rank_users
from rec_dist.ranking.unfinished import Unfinished, is_done, parts_folder, unfinished
from rec_dist.ranking.users import FileUsers, ListedUsers, PreparedUsers, Users
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.disk import writing
from rec_dist.storage.files import fingerprint, sha256
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

MAX_CATALOGUE = 5000  # items that a language model scores for each user: at 10 tokens a title, 50,000 rows of the model


@dataclass(frozen=True)
class RankOptions:
    """For whom, and what may stand in a list. Paths are files; from Python, lists and mappings may take their place.

    histories None: the run's own users, with whole histories, or (split) with those that evaluation asks about.
    """

    histories: Path | Mapping[Any, Any] | Sequence[Any] | None = None
    split: str | None = None
    top_k: int = 10
    exclude_seen: bool = True
    allow: Path | Sequence[str] | None = None
    deny: Path | Sequence[str] | None = None
    candidates: Path | Mapping[Any, Any] | Sequence[Any] | None = None
    max_catalogue: int = MAX_CATALOGUE


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
    _check_options(options, output)
    model = ranked_model(target, overrides)
    with ExitStack() as stack:
        request = _read(model, options, stack)
        key = {**model.identity, **request.identity}
        if output is None:
            assert write is not None
            counts = _stream(model, request, write, progress)
        elif is_done(output, key):
            logger.info(f"{output} is ranked already; nothing to do")
            return Counts()
        else:
            with unfinished(output, key) as parts, writing(output):
                counts = _to_parts(model, request, parts, progress)
        _report(counts, request, output)
        return counts


@dataclass(frozen=True)
class _Request:
    """What is asked for: users, what their lists may hold, and what tells this from another request. size: users of a block."""

    users: Users
    wanted: Wanted
    size: int
    identity: dict[str, Any]


def _check_options(options: RankOptions, output: Path | None) -> None:
    if type(options.top_k) is not int or options.top_k < 1:
        raise UserError(f"--top-k ({options.top_k}) must be a whole number from 1 on")
    if options.split not in (None, "valid", "test"):
        raise UserError(f"--split ({options.split}) must be valid or test; leave it out for whole histories")
    if options.split is not None and options.histories is not None:
        raise UserError("--split chooses among the run's own users and --histories gives others; leave one out")
    if output is not None and output.suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"--out ({output}) must end in {', '.join(OUTPUT_SUFFIXES)}, which says how it is written")
    if output is not None and not parts_folder(output).exists():
        check_output(output, "--out")


def _read(model: RankedModel, options: RankOptions, stack: ExitStack) -> _Request:
    """Reads and checks everything that was given."""
    names = ItemNames(model.data)
    pool, notes = item_pool(names, _names(options.allow, "--allow"), _names(options.deny, "--deny"))
    for note in notes:
        logger.warning(note)
    if model.slow and options.candidates is None and len(pool) > options.max_catalogue:
        raise UserError(
            f"a language model would score {len(pool):,} titles for each user, more than --max-catalogue ({options.max_catalogue:,}); "
            "give --candidates FILE with the users' candidates, --allow FILE with fewer items, or a larger --max-catalogue"
        )
    users = _users(model, options, names)
    lists = None
    if options.candidates is not None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rec-dist-candidates-"))
        source = options.candidates if isinstance(options.candidates, Path) else None
        lists = CandidateLists(Path(folder) / "lists.sqlite", _candidate_rows(options), names, source)
        stack.callback(lists.close)
        if lists.unknown:
            logger.warning(f"--candidates: {lists.unknown:,} names are no item of the catalogue and were skipped")
    wanted = Wanted(pool, names.num_items, options.top_k, options.exclude_seen, lists)
    size = wanted.block_size(slow=model.slow)
    identity = {
        "users": users.identity,
        "top_k": options.top_k,
        "exclude_seen": options.exclude_seen,
        "items": fingerprint(pool.tolist()),
        "candidates": _identity(options),
        "block": size,
    }
    return _Request(users, wanted, size, identity)


def _names(listed: Path | Sequence[str] | None, key: str) -> Sequence[str] | None:
    if listed is None or isinstance(listed, Path):
        return None if listed is None else read_names(listed, key)
    return as_names(list(listed), key.removeprefix("--"))


def _users(model: RankedModel, options: RankOptions, names: ItemNames) -> Users:
    if options.histories is None:
        return PreparedUsers(model.data, options.split)
    if isinstance(options.histories, Path):
        return FileUsers(options.histories, names)
    return ListedUsers(options.histories, names)


def _candidate_rows(options: RankOptions) -> Iterator[Listing]:
    given, histories = options.candidates, options.histories
    if isinstance(given, Path):
        yield from read_listings(given, "candidates", "--candidates")
        return
    assert given is not None
    if not isinstance(given, Mapping) and (
        isinstance(given, str) or not isinstance(histories, Sequence) or len(given) != len(histories)
    ):
        raise UserError("candidates must be a path, a mapping of users to lists, or one list for each of a list of histories")
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    for row, (user, listed) in enumerate(pairs, start=1):
        yield Listing(row, as_user(user, f"candidates: the user {user!r}"), as_names(listed, f"candidates[{user!r}]"))


def _identity(options: RankOptions) -> str | None:
    if options.candidates is None:
        return None
    if isinstance(options.candidates, Path):
        return sha256(options.candidates)
    return fingerprint([[listing.user, listing.names] for listing in _candidate_rows(options)])


def _blocks(model: RankedModel, request: _Request, start: int) -> Iterator[tuple[RecordBatch, Counts]]:
    columns, popularity = ItemColumns(model.data.raw_items, model.data.titles), PopularityScorer(model.data.train_counts)
    with model.scorer() as scorer:
        for ranked in rank_users(request.users, scorer, popularity, request.wanted, size=request.size, start=start):
            rows = (ranked.users, ranked.user, ranked.rank, ranked.item, ranked.score, ranked.fallback)
            yield columns.batch(*rows), ranked.counts


def _to_parts(model: RankedModel, request: _Request, parts: Unfinished, progress: bool) -> Counts:
    total, run = request.users.total, RunDirectory(parts.folder)
    done = parts.start
    if done:
        logger.info(f"{done:,} of {total:,} users are ranked already")
    if done < total:
        with _watched(run, total, done, progress, model.hang_seconds) as report:
            for batch, counts in _blocks(model, request, done):
                parts.add(batch, counts)
                report(counts.users)
    parts.finish()
    return parts.counts


def _stream(model: RankedModel, request: _Request, write: Callable[[RecordBatch], None], progress: bool) -> Counts:
    counts = Counts()
    with (
        tempfile.TemporaryDirectory(prefix="rec-dist-rank-") as folder,
        _watched(RunDirectory(Path(folder)), request.users.total, 0, progress, model.hang_seconds) as report,
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


def _report(counts: Counts, request: _Request, output: Path | None) -> None:
    """One line for each thing that somebody may want to know."""
    logger.info(f"{counts.users:,} users ranked{f' in {output}' if output is not None else ''}")
    lines = [
        (counts.unknown, "items of histories are not in the catalogue and were skipped"),
        (counts.fallback, "users have no known item and got the order of popularity (column fallback)"),
        (counts.without_candidates, "users have no list of candidates and were left out"),
        (counts.empty, "users have no item left to recommend"),
    ]
    lists = request.wanted.candidates
    if lists is not None:
        lines.append((lists.users - counts.users + counts.without_candidates, "lists of candidates belong to no user"))
    for number, what in lines:
        if number > 0:
            logger.warning(f"{number:,} {what}")
