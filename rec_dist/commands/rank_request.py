"""What a ranking is asked for: the options of `rec-dist rank`, checked and read before anything is computed."""

import logging
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from rec_dist.commands.ranked_model import RankedModel
from rec_dist.data.artifacts.recommendations import OUTPUT_SUFFIXES
from rec_dist.data.sources.listings import Listing, as_names, as_text, read_listings
from rec_dist.errors import UserError
from rec_dist.ranking.candidates import CandidateLists
from rec_dist.ranking.catalogue import ItemNames, item_pool, read_names
from rec_dist.ranking.choice import SearchSettings
from rec_dist.ranking.rank import Wanted
from rec_dist.ranking.search import Score
from rec_dist.ranking.unfinished import parts_folder
from rec_dist.ranking.users import FileUsers, ListedUsers, PreparedUsers, Users
from rec_dist.storage.files import fingerprint, sha256
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

SearchKind = Literal["all", "exact", "beam"]
MAX_CATALOGUE = 5000  # items that a language model scores for each user: at 10 tokens a title, 50,000 rows of the model
BEAM = 20  # nodes of the trie that a step keeps


@dataclass(frozen=True)
class RankOptions:
    """For whom, and what may stand in a list. Paths are files; from Python, lists and mappings may take their place.

    histories None: the run's own users, with whole histories, or (split) with those that evaluation asks about. search: all, to
    score every item, or a search of the titles (ranking.search.Search.top_k) with beam (BEAM) and max_rows. score None: what
    evaluate scores by. items: new items by their ids, with titles. launcher: this process, or the workers of a Ray cluster.
    """

    histories: Path | Mapping[Any, Any] | Sequence[Any] | None = None
    split: str | None = None
    top_k: int = 10
    exclude_seen: bool = True
    allow: Path | Sequence[str] | None = None
    deny: Path | Sequence[str] | None = None
    candidates: Path | Mapping[Any, Any] | Sequence[Any] | None = None
    items: Path | Mapping[Any, Any] | None = None
    max_catalogue: int = MAX_CATALOGUE
    search: SearchKind = "all"
    score: Score | None = None
    beam: int | None = None
    max_rows: int | None = None
    launcher: Literal["local", "ray"] = "local"


@dataclass(frozen=True)
class RankRequest:
    """What is asked for: users, what their lists may hold, and what tells this from another request. size: users of a block.

    score, launcher: as in RankOptions.
    """

    users: Users
    wanted: Wanted
    score: Score | None
    launcher: str
    size: int
    identity: dict[str, Any]


def check_options(options: RankOptions, output: Path | None) -> None:
    """Raises UserError for options that contradict each other, and for an output that cannot be written."""
    for name, number in (("top-k", options.top_k), ("max-catalogue", options.max_catalogue)):
        if type(number) is not int or number < 1:
            raise UserError(f"--{name} ({number}) must be a whole number from 1 on")
    if options.launcher not in ("local", "ray"):
        raise UserError(f"--launcher ({options.launcher}) must be local or ray")
    if options.split not in (None, "valid", "test"):
        raise UserError(f"--split ({options.split}) must be valid or test; leave it out for whole histories")
    if options.split is not None and options.histories is not None:
        raise UserError("--split chooses among the run's own users and --histories gives others; leave one out")
    _check_search(options)
    if output is not None and output.suffix not in OUTPUT_SUFFIXES:
        raise UserError(f"--out ({output}) must end in {', '.join(OUTPUT_SUFFIXES)}, which says how it is written")
    if output is not None and not parts_folder(output).exists():
        check_output(output, "--out")


def _check_search(options: RankOptions) -> None:
    for name, value, known in (("search", options.search, get_args(SearchKind)), ("score", options.score, get_args(Score))):
        if value is not None and value not in known:
            raise UserError(f"--{name} ({value}) must be one of {', '.join(known)}")
    for name, number in (("beam", options.beam), ("max-rows", options.max_rows)):
        if number is None:
            continue
        if type(number) is not int or number < 1:
            raise UserError(f"--{name} ({number}) must be a whole number from 1 on")
        if options.search == "all":
            raise UserError(
                f"--{name} ({number}) has no effect when every title is scored; give --search exact or beam, or leave it out"
            )
    if options.search != "all" and options.candidates is not None:
        raise UserError(f"--search {options.search} ranks the catalogue and --candidates gives each user a list; leave one out")


def read_request(model: RankedModel, options: RankOptions, stack: ExitStack) -> RankRequest:
    """Reads and checks everything that was given."""
    names = ItemNames(model.data)
    pool, notes = item_pool(names, _names(options.allow, "--allow"), _names(options.deny, "--deny"))
    for note in notes:
        logger.warning(note)
    _check_work(model, options, len(pool))
    users = _users(model, options, names)
    lists = None
    if options.candidates is not None:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="rec-dist-candidates-"))
        source = options.candidates if isinstance(options.candidates, Path) else None
        lists = CandidateLists(Path(folder) / "lists.sqlite", _candidate_rows(options), names, source)
        stack.callback(lists.close)
        if lists.unknown:
            logger.warning(f"--candidates: {lists.unknown:,} names are no item of the catalogue and were skipped")
    search = None
    if options.search != "all":
        search = SearchSettings(options.search == "exact", options.beam or BEAM, options.max_rows)
    wanted = Wanted(pool, names.num_items, options.top_k, options.exclude_seen, lists, search)
    size = wanted.block_size(model.titles_read(wanted.longest))
    identity = {
        "users": users.identity,
        "top_k": options.top_k,
        "exclude_seen": options.exclude_seen,
        "items": fingerprint(pool.tolist()),
        "candidates": _identity(options),
        "search": None if search is None else vars(search),
        "score": options.score,
        "block": size,
    }
    return RankRequest(users, wanted, options.score, options.launcher, size, identity)


def _check_work(model: RankedModel, options: RankOptions, items: int) -> None:
    """Raises UserError for a search without titles, and for more titles than a language model should score one by one."""
    if not model.slow and (options.search != "all" or options.score is not None):
        raise UserError(
            "--search and --score are for language models that score titles; this one ranks the whole catalogue at once, so leave "
            "them out"
        )
    if model.config.evaluate.corrects and (options.search != "all" or options.score is not None):
        raise UserError(
            "--search and --score have no effect on corrected scores; leave them out, or set evaluate.title_prior=0 and "
            "evaluate.length_power=0"
        )
    if model.slow and options.search == "all" and options.candidates is None and items > options.max_catalogue:
        raise UserError(
            f"a language model would score {items:,} titles for each user, more than --max-catalogue ({options.max_catalogue:,}); "
            "give --search exact, --candidates FILE with the users' candidates, --allow FILE with fewer items, or a larger "
            "--max-catalogue"
        )


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
        yield from read_listings(given, "candidates", "--candidates", single="item_id")
        return
    assert given is not None
    if not isinstance(given, Mapping) and (
        isinstance(given, str) or not isinstance(histories, Sequence) or len(given) != len(histories)
    ):
        raise UserError("candidates must be a path, a mapping of users to lists, or one list for each of a list of histories")
    pairs = given.items() if isinstance(given, Mapping) else enumerate(given)
    for row, (user, listed) in enumerate(pairs, start=1):
        yield Listing(row, as_text(user, f"candidates: the user {user!r}"), as_names(listed, f"candidates[{user!r}]"))


def _identity(options: RankOptions) -> str | None:
    if options.candidates is None:
        return None
    if isinstance(options.candidates, Path):
        return sha256(options.candidates)
    return fingerprint([[listing.user, listing.names] for listing in _candidate_rows(options)])
