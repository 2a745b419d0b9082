"""Questions from a file (evaluate.questions) in place of a split, so that the test rows of another paper are asked exactly.

Every row of the file is one example, in the order of the file. Users are numbered in the order of their first row, and may have
several rows; the position of an example is the number of its question, from 0, which keeps them apart. The items of all rows are
held, 4 bytes each.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np

from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.sources.benchmarks import BENCHMARKS, find_benchmark
from rec_dist.data.sources.blocks import read_buffer
from rec_dist.data.sources.history_rows import BEAR, MINIONEREC, OWN, HistoryRow, read_history_rows
from rec_dist.data.sources.interactions import BadRows
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import Candidates, EvalExample, EvalExamples, drawn_users
from rec_dist.runtime.arrays import I32, I64

_KEY = "evaluate.questions"


@dataclass(frozen=True)
class QuestionFile:
    """A file of questions. fingerprint: of its unpacked bytes, so that a packed copy is the same file."""

    path: Path
    fingerprint: str


def find_questions(place: Path, format_name: str, category: str | None) -> QuestionFile:
    """The file at `place`, or the test file of the benchmark in the folder `place`. format_name, category: as in data.

    Raises UserError if there is none.
    """
    if place.is_dir():
        if format_name not in BENCHMARKS:
            raise UserError(
                f"{_KEY} ({place}) is a folder, which only a benchmark's data.format has; name the file of questions."
            )
        place = find_benchmark(place, format_name, category).part("test", _KEY)
    if not place.is_file():
        raise UserError(f"{_KEY} ({place}) does not exist; name a file of questions.")
    return QuestionFile(place, hashlib.sha256(read_buffer(place)).hexdigest()[:16])


def build_question_examples(
    data: PreparedData,
    path: Path,
    *,
    num_candidates: int | Literal["all"],
    max_users: int | None,
    seed: int,
    exclude_seen: bool = True,
) -> EvalExamples:
    """The examples of the file `path` (read_history_rows lists the layouts), for the catalogue of `data`.

    If the file has candidates, these are ranked, in the order of the file, and num_candidates and exclude_seen have no effect.
    max_users: that many users, drawn by hash, with all of their rows. Raises UserError for an unreadable row, for an item that is
    not in the catalogue, for candidates that lack the target or repeat an item, or for too few items.
    """
    bad = BadRows()
    rows = read_history_rows(path, bad, [OWN, MINIONEREC, BEAR])
    if bad.counts:
        raise UserError(f"{_KEY}: {bad.describe()}; correct the file.")
    if not rows:
        raise UserError(f"{_KEY} ({path}) holds no row; name a file of questions.")
    given = sum(row.candidates is not None for row in rows)
    if given not in (0, len(rows)):
        without = next(row for row in rows if row.candidates is None)
        raise UserError(
            f"{path}:{without.line}: the row has no candidates, and {given} others have; give all rows some, or none."
        )
    _check_items(rows, path, data)
    number: dict[str, int] = {}
    users = np.array([number.setdefault(row.user, len(number)) for row in rows], dtype=np.int64)
    kept = np.isin(users, drawn_users(np.arange(len(number), dtype=np.int64), max_users, seed))
    place = {name: item for item, name in enumerate(data.raw_items)}
    candidates = Candidates(data.num_items, num_candidates, exclude_seen=exclude_seen, seed=seed)

    def items(names: Sequence[list[str]]) -> tuple[I32, I64]:
        """The items of several lists, and where each list begins among them."""
        flat = np.array([place[name] for each in names for name in each], dtype=np.int32)
        return flat, offsets_of(np.array([len(each) for each in names], dtype=np.int64))

    positions = np.flatnonzero(kept)
    asked = [rows[position] for position in positions.tolist()]
    users, (shown, begins), (targets, _) = (
        users[positions],
        items([row.history for row in asked]),
        items([[r.target] for r in asked]),
    )
    listed, bounds = items([_checked_candidates(row, path) for row in asked] if given else [])

    def make(number: int) -> EvalExample:
        user, position, target = int(users[number]), int(positions[number]), int(targets[number])
        history = shown[begins[number] : begins[number + 1]]
        if given:
            return EvalExample(user, position, target, history, listed[bounds[number] : bounds[number + 1]], given=True)
        return EvalExample(user, position, target, history, candidates.of(user, position, target, history))

    examples = EvalExamples(users, make)
    return examples if given else examples.check_candidates(candidates, np.diff(begins))


def _check_items(rows: list[HistoryRow], path: Path, data: PreparedData) -> None:
    known = set(data.raw_items)
    unknown = [
        (row.line, name, what)
        for row in rows
        for what, names in (("history", row.history), ("target", [row.target]), ("list of candidates", row.candidates or []))
        for name in names
        if name not in known
    ]
    if not unknown:
        return
    line, name, what = unknown[0]
    more = f", and neither are {len(unknown) - 1} more names in the file" if len(unknown) > 1 else ""
    merged = data.manifest.counts.get("merged_items", 0)
    way_out = (
        f"{merged} items were merged with others of the same title, so prepare it with data.merge_equal_titles=false"
        if merged
        else "prepare data that has these items, or take their rows out"
    )
    raise UserError(f"{path}:{line}: the {what} has the item {name!r}, which {data.location} does not hold{more}; {way_out}.")


def _checked_candidates(row: HistoryRow, path: Path) -> list[str]:
    names = row.candidates
    assert names is not None, "the caller has looked"
    if row.target not in names:
        raise UserError(f"{path}:{row.line}: the target {row.target!r} is not among its candidates; add it.")
    if len(set(names)) < len(names):
        raise UserError(f"{path}:{row.line}: an item stands twice among the candidates; name each once.")
    if len(names) < 2:
        raise UserError(f"{path}:{row.line}: the target is the only candidate; name another item.")
    return names
