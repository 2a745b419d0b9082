"""Data sets, questions and scorers for audits: clean ones, and the same with one fault each.

An item is followed by its successor half of the time and by a random item otherwise, so histories say something, and whole
histories repeat no more often than chance explains.
"""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.evaluation.baselines import Floats
from rec_dist.runtime.arrays import I32

NUM_ITEMS, LENGTH = 60, 12
_SYLLABLES = ("ba", "ke", "mi", "do", "lu", "sa", "ve", "ri", "no", "tu")


def title(item: int) -> str:
    """Two words that no other item has."""
    return f"{_SYLLABLES[item % 10]}{_SYLLABLES[item // 10]}n {_SYLLABLES[item // 10]}{_SYLLABLES[(3 * item + 1) % 10]}{item}"


def walk(rng: np.random.Generator) -> list[int]:
    """The items of one user, each once."""
    items = [int(rng.integers(NUM_ITEMS))]
    while len(items) < LENGTH:
        follower = (items[-1] + 7) % NUM_ITEMS
        if follower in items or rng.random() < 0.5:
            follower = int(rng.choice(np.setdiff1d(np.arange(NUM_ITEMS), items)))
        items.append(follower)
    return items


def prepared(folder: Path, walks: Sequence[Sequence[int]], titles: Sequence[str] | None = None, **settings: object) -> Path:
    """The data set of these users, whose interactions begin at random times; by default with one cut in time."""
    rng = np.random.default_rng(1)
    lines = ["user,item,timestamp,title"]
    for user, items in enumerate(walks):
        start = int(rng.integers(1_000_000))
        lines += [
            f"u{user:04d},i{item:03d},{start + 5000 * step},{titles[item] if titles else title(item)}"
            for step, item in enumerate(items)
        ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "rows.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    keys = {"split": "global_temporal", "min_user_interactions": 1, **settings}
    prepare(DataConfig(source=str(folder / "rows.csv"), path=str(folder / "data"), **keys))
    return folder / "data"


def walks(num: int = 400) -> list[list[int]]:
    """The items of `num` users."""
    rng = np.random.default_rng(0)
    return [walk(rng) for _ in range(num)]


def write_questions(path: Path, rows: Sequence[tuple[list[int], int, list[int]]]) -> Path:
    """Writes (history, target, candidates) as a file for evaluate.questions, one user each."""
    named = [[f"i{item:03d}" for item in (*history, target, *among)] for history, target, among in rows]
    lines = []
    for number, ((history, _, _), names) in enumerate(zip(rows, named, strict=True)):
        size = len(history)
        fields = {"user_id": f"q{number}", "history": names[:size], "target": names[size], "candidates": names[size + 1 :]}
        lines.append(json.dumps(fields))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


class Oracle:
    """Knows the successor of the last item, so it follows the order of the history; noise decides among the rest.

    blind: items that it scores at random whatever comes before. told: the target of some histories, by their bytes.
    """

    def __init__(self, data: PreparedData, blind: I32 | None = None, told: dict[bytes, int] | None = None) -> None:
        names = {name: item for item, name in enumerate(data.raw_items)}
        self._next = np.asarray([names.get(f"i{(int(name[1:]) + 7) % NUM_ITEMS:03d}", 0) for name in data.raw_items])
        self._blind = np.empty(0, dtype=np.int32) if blind is None else blind
        self._told, self._rng = told or {}, np.random.default_rng(5)

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As CandidateScorer.score."""
        found = []
        for history, items in zip(histories, candidates, strict=True):
            answer = self._told.get(history.tobytes(), self._next[history[-1]])
            hit = (items == answer) & ~np.isin(items, self._blind)
            found.append(3.0 * hit + self._rng.random(len(items)))
        return found


class Bag:
    """Likes items whose successor-of relation holds to any item of the history: the order of the history says nothing to it."""

    def __init__(self, data: PreparedData) -> None:
        self._next = Oracle(data)._next

    def score(self, histories: Sequence[I32], candidates: Sequence[I32]) -> list[Floats]:
        """As CandidateScorer.score."""
        return [
            np.isin(items, self._next[history]) + items / (10.0 * NUM_ITEMS)
            for history, items in zip(histories, candidates, strict=True)
        ]
