"""negatives.kind=model: the lists are a brute-force ranking's window of ranks, and the negatives come from them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import rec_dist
from rec_dist.config.load import load_config
from rec_dist.data.artifacts.hard_negatives import read_hard_negatives
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.errors import UserError
from rec_dist.evaluation.examples import EvalExample
from rec_dist.methods.language_model.hard_negatives import lists_key, make_hard_negatives, training_examples, window
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.methods.neighbours.scorer import NeighboursScorer
from rec_dist.methods.neighbours.tables import NeighbourTables
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.runtime.run_directory import RunDirectory

Make = Callable[..., dict[str, Any]]
FIRST, LAST = 3, 8


@pytest.fixture(scope="module")
def neighbours(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = rec_dist.train(tiny_config(tmp_path_factory.mktemp("source") / "neighbours", "task.kind=neighbours"))
    return Path(run.path)


def _config(make: Make, folder: Path, source: Path, *changes: str) -> Any:
    keys = ["task.kind=sdpo", "negatives.kind=model", f"negatives.model={source}", f"negatives.ranks=[{FIRST},{LAST}]"]
    return load_config(make(folder, *keys, *changes))


def _launch(*_: Any) -> Any:
    raise AssertionError("neighbours need no workers")


def test_the_window_by_hand() -> None:
    example = EvalExample(0, 2, 4, np.asarray([1, 2], dtype=np.int32), np.arange(8, dtype=np.int32))
    scores = np.asarray([0.1, 9, 9, 0.5, 9, 0.4, 0.3, 0.5])  # without 1, 2, 4 and 6: 3, 7 (a tie), 5, 0
    held_out = np.asarray([6], dtype=np.int32)
    assert window(scores, example, held_out, 1, 2).tolist() == [3, 7]
    assert window(scores, example, held_out, 2, 5).tolist() == [7, 5, 0, -1]


def test_lists_are_those_of_brute_force_and_negatives_come_from_them(tiny_config: Make, neighbours: Path, tmp_path: Path) -> None:
    config = _config(tiny_config, tmp_path / "run", neighbours)
    data, run = open_data(config.data), RunDirectory(tmp_path / "run")
    run.path.mkdir()
    make_hard_negatives(config, run, _launch)
    found = read_hard_negatives(run.path, key=lists_key(config, data))
    assert found is not None
    scorer = NeighboursScorer(NeighbourTables.read(neighbours / "model"), NeighboursConfig())
    split = data.split("train")
    for row in range(0, len(split), 7):
        items, user = split.items_of(row), int(split.user_ids[row])
        for position in range(1, len(items)):
            (scores,) = scorer.score([items[:position]], [np.arange(data.num_items)])
            order = [i for i in np.argsort(-scores, kind="stable").tolist() if i not in items[: position + 1]]
            assert found.of(user, position).tolist() == order[FIRST - 1 : LAST]
    others = _config(tiny_config, tmp_path / "run", neighbours, "train.seed=1")
    with pytest.raises(UserError, match="other data, keys or weights"):
        build_task(others, find_initial_weights(others), "cpu")
    task = build_task(config, find_initial_weights(config), "cpu")
    example = task.data.example(5, 0)
    row, position = int(task.data.targets.rows[5]), int(task.data.targets.starts[5])
    groups = task.data.draw(np.asarray([5]), np.asarray([0])).groups.completions[0]
    allowed = found.of(int(split.user_ids[row]), position).tolist()
    assert set(groups[1:].tolist()) <= set(allowed) and len(set(groups.tolist())) == 4
    assert example.num_tokens == task.data.draw(np.asarray([5]), np.asarray([0])).build([0])[0].num_tokens


def test_a_pool_is_drawn_outside_history_and_target(tiny_config: Make, tiny_data: Path) -> None:
    data = open_data(load_config(tiny_config("x")).data)
    for example in training_examples(data, pool=9, seed=3)[::50]:
        assert len(set(example.candidates.tolist())) == 10 and example.candidates[-1] == example.target
        assert not np.isin(example.history, example.candidates).any()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (["negatives.ranks=[5,4]"], "negatives.ranks"),
        (["negatives.ranks=[1,2]"], "fewer items than negatives.num"),
        (["negatives.pool=7"], "negatives.pool"),
        (["task.kind=sft"], "no effect on task.kind=sft"),
        (["negatives.model=nowhere"], "negatives.model"),
        (["negatives.model=null"], "negatives.model"),
    ],
)
def test_what_cannot_work_names_the_key(
    tiny_config: Make, neighbours: Path, tmp_path: Path, changes: list[str], words: str
) -> None:
    config = _config(tiny_config, tmp_path / "run", neighbours, *changes)
    with pytest.raises(UserError, match=words.replace(".", r"\.")):
        build_task(config, find_initial_weights(config), "cpu")
