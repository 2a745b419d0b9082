"""The best items of a trained recommender at every training target, given only the history before it.

At position p of a user the model reads items max(0, p - max_length) .. p - 1, as in evaluation. Its weights were trained on these
targets, so the lists are better here than on held-out rows. The training split holds no validation or test item.

Cost: one pass covers all targets within the first max_length items of a row; each later target takes a pass of max_length items.

T rows of a pass, M targets scored at once, I items of the catalogue, h items a list.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from rec_dist.data.artifacts.teacher import TopItems
from rec_dist.data.dataset.prepared_data import SequenceSplit
from rec_dist.methods.sequential.next_item import SequentialModel
from rec_dist.methods.sequential.sequences import lay_out
from rec_dist.runtime.arrays import I32

# Rows of one pass, and logits held at once: 2 ** 24 float32 are 64 MiB, at any size of catalogue.
_ROWS_AT_ONCE, _LOGITS_AT_ONCE = 8192, 1 << 24


@dataclass(frozen=True)
class _Pass:
    """items[start:stop] of row `row`. Its last `count` positions predict the targets at stop - count + 1 .. stop."""

    row: int
    start: int
    stop: int
    count: int


def top_items(
    model: SequentialModel, split: SequenceSplit, *, num_items: int, max_length: int, top_h: int, device: str
) -> Iterator[TopItems]:
    """The lists of every target of `split`, in ascending (row, position). A list holds no item of the history before it.

    The caller ensures that at least h items are outside each history.
    """
    waiting: list[_Pass] = []
    rows = 0
    for row in range(len(split)):
        length, first = int(split.offsets[row + 1] - split.offsets[row]), max(int(split.first_target[row]), 1)
        for step in _passes(row, length, first, max_length):
            size = step.stop - step.start
            if waiting and rows + size > _ROWS_AT_ONCE:
                yield _run(model, split, waiting, num_items, top_h, device)
                waiting, rows = [], 0
            waiting.append(step)
            rows += size
    if waiting:
        yield _run(model, split, waiting, num_items, top_h, device)


def _passes(row: int, length: int, first: int, max_length: int) -> Iterator[_Pass]:
    whole = min(length - 1, max_length)  # the last target whose whole history fits
    if whole >= first:
        yield _Pass(row, 0, whole, whole - first + 1)
    for position in range(max(first, max_length + 1), length):
        yield _Pass(row, position - max_length, position, 1)


@torch.no_grad()
def _run(
    model: SequentialModel, split: SequenceSplit, passes: Sequence[_Pass], num_items: int, top_h: int, device: str
) -> TopItems:
    """One batch of passes. The model does not see the targets; zeros replace them."""
    inputs = [split.items_of(step.row)[step.start : step.stop] for step in passes]
    batch = lay_out(inputs, [np.zeros(step.count, dtype=np.int32) for step in passes]).to(device)
    hidden = model.encode(batch)[batch.rows]  # (M, D)
    positions = np.concatenate([np.arange(step.stop - step.count + 1, step.stop + 1) for step in passes])  # (M,)
    found, at, at_once = [], 0, max(1, _LOGITS_AT_ONCE // num_items)
    for step in passes:
        chosen = _first_chosen(split.items_of(step.row)[: step.stop], num_items).to(device)  # (I,)
        for begin in range(at, at + step.count, at_once):
            end = min(begin + at_once, at + step.count)
            before = torch.from_numpy(positions[begin:end]).to(device).unsqueeze(1)  # (m, 1)
            scores = model.score(hidden[begin:end]).masked_fill(chosen < before, float("-inf"))  # (m, I)
            found.append(scores.topk(top_h, dim=1).indices.to("cpu", torch.int32).numpy())
        at += step.count
    users = np.repeat(split.user_ids[[step.row for step in passes]], [step.count for step in passes])
    return TopItems(users, positions, np.concatenate(found))


def _first_chosen(items: I32, num_items: int) -> torch.Tensor:
    """(I,) int64: the first position of each item of the catalogue in `items`, or len(items) if it is not there."""
    first = np.full(num_items, len(items), dtype=np.int64)
    np.minimum.at(first, items, np.arange(len(items)))
    return torch.from_numpy(first)
