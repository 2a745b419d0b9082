"""RecPO's margins by hand, built with the prompts and alone, and the data it takes."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from prepared_rows import Row, write_prepared

from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.recpo.config import RecpoConfig
from rec_dist.methods.recpo.method import RecencyMargins
from rec_dist.methods.registry import build_task
from rec_dist.packing.packed_batch import dummy_batch, pack_prompts


@pytest.fixture
def make_task(tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(*changes: str | dict[str, Any]) -> Any:
        config = tiny_config(tmp_path / "run", "task.kind=recpo", "train.max_tokens_per_micro_batch=4096", *changes)
        return build_task(RunConfig.model_validate(config), InitialWeights(tiny_model_dir), "cpu")

    return make


def by_hand(split: Any, key: int, completions: list[int], settings: RecpoConfig) -> list[float]:
    """The formula, item by item."""
    place = key % split.num_items
    row = next(r for r in range(len(split)) if split.offsets[r] <= place < split.offsets[r + 1])
    position, items, ratings = place - int(split.offsets[row]), split.items_of(row).tolist(), split.ratings_of(row).tolist()
    values = []
    for item in completions:
        delay = min(items.index(item) - position if item in items else settings.unseen_delay, settings.unseen_delay)
        rating = ratings[items.index(item)] if item in items else settings.unseen_rating
        values.append((rating if settings.ratings else 1.0) / (1 + delay) ** settings.decay)
    assert items[position] == completions[0]
    return [0.0, *(settings.margin * values[0] / value for value in values[1:])]


@pytest.mark.parametrize("settings", [RecpoConfig(), RecpoConfig(ratings=False, margin=0.5, decay=1.0, unseen_delay=3)])
def test_margins_are_the_formula(tiny_data: Path, settings: RecpoConfig) -> None:
    split = PreparedData.open(tiny_data).split("train")
    margins, rng, later = RecencyMargins(settings), np.random.default_rng(0), 0
    keys, groups = [], []
    for row in range(0, len(split), 3):
        items = split.items_of(row).tolist()
        position = int(rng.integers(1, len(items) - 2))
        unseen = [item for item in range(80) if item not in items]
        keys.append(split.num_items * int(rng.integers(3)) + int(split.offsets[row]) + position)
        groups.append([items[position], items[-1], unseen[0], items[position + 1], unseen[-1]])
        later += 2
    found = margins(split, np.asarray(keys), np.asarray(groups, dtype=np.int32))
    assert found.dtype == np.float32 and later > 10
    for row, (key, group) in enumerate(zip(keys, groups, strict=True)):
        assert found[row].tolist() == pytest.approx(by_hand(split, key, group, settings), rel=1e-6)
    assert (found[:, 1:] > 0).all()
    assert margins(split, np.empty(0, dtype=np.int64), np.empty((0, 4), dtype=np.int32)).shape == (0, 4)


@pytest.mark.parametrize(
    "changes",
    [
        ("negatives.num=40",),  # half of the catalogue: later items of the user are among them
        ("train.targets_per_prompt=4", "negatives.refresh_each_epoch=true"),
        ("prompt.candidates=listed", "evaluate.num_candidates=20"),
    ],
)
def test_margins_come_with_the_prompts(changes: tuple[str, ...], make_task: Callable[..., Any]) -> None:
    task = make_task(*changes)
    indices = np.tile(np.arange(task.sampler.num_examples), 2)[::-1].copy()
    epochs = np.repeat([1, 0], task.sampler.num_examples)
    built = task.data.draw(indices, epochs).build(range(len(indices)))
    usual = set()
    for prompt, index, epoch in zip(built, indices.tolist(), epochs.tolist(), strict=True):
        alone = task.data.example(index, epoch)
        assert prompt.margins.dtype == np.float32 and len(prompt.margins) == len(prompt.lengths)
        np.testing.assert_array_equal(prompt.margins, alone.margins)
        firsts = np.cumsum(prompt.group_sizes) - prompt.group_sizes
        assert (prompt.margins[firsts] == 0).all() and (prompt.margins > 0).sum() == len(prompt.lengths) - len(firsts)
        usual |= set(prompt.margins.tolist())
    assert len(usual) > 2, "no item that its user takes later was ever rejected"
    batch = pack_prompts(built[:3])
    assert batch.margins is not None
    np.testing.assert_array_equal(batch.margins.numpy(), np.concatenate([prompt.margins for prompt in built[:3]]))


def test_a_chosen_item_that_its_user_had_before_counts_where_it_is_chosen(tmp_path: Path) -> None:
    rows = {"train": [Row(0, [4, 1, 2, 4, 3])]}
    split = write_prepared(tmp_path / "data", rows, ["a", "b", "c", "d", "e", "f"]).split("train")
    margins = RecencyMargins(RecpoConfig(ratings=False))
    found = margins(split, np.asarray([3]), np.asarray([[4, 3, 0]], dtype=np.int32))  # the second 4, against the next item
    assert found[0].tolist() == pytest.approx([0.0, 2.0 * 2**0.5, 2.0 * 11**0.5])


def test_other_methods_carry_no_margins(make_task: Callable[..., Any]) -> None:
    task = make_task("task.kind=sdpo")
    assert task.data.example(0, 0).margins is None
    assert pack_prompts([task.data.example(0, 0)]).margins is None and dummy_batch(3).margins is None


def test_data_without_ratings_are_refused(tiny_source: Path, make_task: Callable[..., Any], tmp_path: Path) -> None:
    lines = [line.split(",") for line in tiny_source.read_text(encoding="utf-8").splitlines()]
    plain = tmp_path / "plain.csv"
    plain.write_text("\n".join(",".join([*words[:2], *words[3:]]) for words in lines) + "\n", encoding="utf-8")
    prepare(DataConfig(source=str(plain), path=str(tmp_path / "plain"), split="leave_one_out"))
    prepare(DataConfig(source=str(tiny_source), path=str(tmp_path / "all"), split="leave_one_out"))
    without = {"data.path": str(tmp_path / "plain"), "data.source": str(plain), "data.min_rating": None}
    with pytest.raises(UserError, match=r"task\.kind=recpo compares ratings.*set task\.recpo\.ratings=false"):
        make_task(without)
    with pytest.raises(UserError, match=r"data\.min_rating was None.*prepare it with a data\.min_rating above 0"):
        make_task({"data.path": str(tmp_path / "all"), "data.min_rating": None})
    task = make_task(without, "task.recpo.ratings=false")
    assert (task.data.example(0, 0).margins[1:] > 0).all()


def test_items_whose_ratings_are_not_kept_are_refused(make_task: Callable[..., Any]) -> None:
    with pytest.raises(UserError, match=r"negatives\.kind=low_rated draws items whose ratings are not kept"):
        make_task("negatives.kind=low_rated")
