"""The exact top 10 of a language model's catalogue by search, against scoring every title, with beams of 10 and 50 beside it.

    python -m benchmarks.catalogue_search runs/quickstart/sft --users 20 --out search.json
    python -m benchmarks.catalogue_search quickstart:sft --score trie --users 5 --all-users 1    # the base model of a recipe
    python -m benchmarks.catalogue_search --markdown search.json

TARGET is a run directory or a configuration; its data set must be prepared. The users are the first of the test split in the
order of a hash, with what precedes their target; seen items are left out.

"rows" are rows of the model behind the prompt: for "all" those of every title, which share the prompt too. "seconds" are those of
one user, prompt included; "all" is the packed pass of `rank --search all`, for the first --all-users users only. "lost" is how many
of the true top 10 a beam misses, "users hit" the share of users who miss at least one. A beam keeps every title that it has
scored, which is generous to it.
Cost: SmolLM2-135M in float32 runs some 400 rows a second on 2 cores, so 20 users of MovieLens-100K take up to 15 minutes.
"""

import statistics
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any, get_args

import numpy as np

from benchmarks import results
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.data.prompts.title_trie import completions_of
from rec_dist.methods.language_model.scorer import LanguageModelScorer
from rec_dist.ranking.search import Found, Score
from rec_dist.ranking.users import PreparedUsers
from rec_dist.runtime.arrays import F64, I32
from rec_dist.runtime.quiet import quieten
from rec_dist.runtime.rng import hash_u64

TOP_K, BEAMS = 10, (10, 50)


def measure(
    target: str, overrides: Sequence[str], scores: Sequence[Score], num_users: int, all_users: int
) -> list[dict[str, Any]]:
    """A row for each score and way."""
    model = ranked_model(target, list(overrides))
    (block,) = PreparedUsers(model.data, "test").blocks(1 << 40)
    order = np.argsort(hash_u64(0, 0, np.arange(len(block.users))))
    histories = [history for number in order.tolist() if len(history := block.histories[number])][:num_users]
    rows: list[dict[str, Any]] = []
    with model.scorer() as loaded:
        if not isinstance(loaded, LanguageModelScorer):
            raise SystemExit(f"{target} is no language model that scores titles")
        for score in scores:
            scorer = loaded.scoring_by(score)
            for row in _ways(scorer, histories, all_users):
                rows.append({"score": score, "items": model.data.num_items, **row})
                print(f"{score}, {row['way']}: rows {row['rows']}, seconds {row['seconds']}", file=sys.stderr, flush=True)
    return rows


def _ways(scorer: LanguageModelScorer, histories: Sequence[I32], all_users: int) -> Iterator[dict[str, Any]]:
    exact = [_search(scorer, history, beam=max(TOP_K, 20), exact=True) for history in histories]
    assert all(found.certified for found, _ in exact)
    yield _row("exact", exact)
    yield _all(scorer, histories[:all_users], [found for found, _ in exact])
    for beam in BEAMS:
        found = [_search(scorer, history, beam=beam, exact=False) for history in histories]
        lost = [len(np.setdiff1d(true.items, own.items)) for (true, _), (own, _) in zip(exact, found, strict=True)]
        yield {
            **_row(f"beam {beam}", found),
            "lost": sum(lost) / sum(len(true.items) for true, _ in exact),
            "users_hit": sum(number > 0 for number in lost) / len(lost),
        }


def _search(scorer: LanguageModelScorer, history: I32, *, beam: int, exact: bool) -> tuple[Found, float]:
    """What a search finds, and its seconds."""
    began = time.perf_counter()
    found = scorer.search(history, prior=_prior(scorer, history)).top_k(TOP_K, beam=beam, exact=exact)
    return found, time.perf_counter() - began


def _prior(scorer: LanguageModelScorer, history: I32) -> F64:
    prior = np.zeros(len(scorer.builder.titles))
    prior[history] = -np.inf
    return prior


def _row(way: str, found: Sequence[tuple[Found, float]]) -> dict[str, Any]:
    return {
        "way": way,
        "rows": [one.rows for one, _ in found],
        "seconds": [seconds for _, seconds in found],
        "certified": sum(one.certified for one, _ in found) / len(found),
    }


def _all(scorer: LanguageModelScorer, histories: Sequence[I32], exact: Sequence[Found]) -> dict[str, Any]:
    """Every title, scored in packed batches. Stops if its best are not those of the search."""
    titles = scorer.builder.titles
    items, per_title = np.arange(len(titles), dtype=np.int32), np.diff(completions_of(scorer.builder)[1]) - 1
    seconds = []
    for history, found in zip(histories, exact, strict=False):
        began = time.perf_counter()
        (scores,) = scorer.score([history], [items])
        seconds.append(time.perf_counter() - began)
        scores[history] = -np.inf
        difference = np.abs(np.sort(scores)[::-1][: len(found.scores)] - found.scores).max()
        assert difference <= 1e-3, f"the search differs from scoring every title by {difference}"
    return {"way": "all", "rows": [int(per_title.sum())], "seconds": seconds, "certified": None}


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the table of a result."""
    rows = []
    for row in result["rows"]:
        values, seconds = sorted(row["rows"]), row["seconds"]
        rows.append(
            {
                "score": row["score"],
                "items": f"{row['items']:,}",
                "way": row["way"],
                "users": len(seconds),
                "rows, median": f"{statistics.median(values):,.0f}",
                "rows, most": f"{values[-1]:,}",
                "seconds": f"{statistics.median(seconds):.2f}" if seconds else None,
                "certified": None if row["certified"] is None else f"{row['certified']:.0%}",
                "lost": f"{row['lost']:.1%}" if "lost" in row else None,
                "users hit": f"{row['users_hit']:.0%}" if "lost" in row else None,
            }
        )
    return f"{results.table(rows, markdown=markdown)}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("target", nargs="?", help="run directory or configuration")
    parser.add_argument("overrides", nargs="*", default=[], help="section.key=value")
    parser.add_argument("--score", choices=get_args(Score), nargs="+", default=list(get_args(Score)), help="which scores (both)")
    parser.add_argument("--users", type=results.positive, default=20, help="users (20)")
    parser.add_argument("--all-users", type=int, default=3, help="users for whom every title is scored as well (3)")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    if given.target is None:
        parser.error("name a run directory or a configuration")
    quieten()
    rows = measure(given.target, given.overrides, given.score, given.users, given.all_users)
    results.conclude(results.facts(results.command_of("benchmarks.catalogue_search", words), rows=rows), report, given.out)


if __name__ == "__main__":
    main()
