"""Predictions read back as they were written, including ragged candidates."""

from pathlib import Path

import numpy as np
import pytest

from rec_dist.data.artifacts.predictions import Predictions, writing_predictions
from rec_dist.errors import UserError


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = Predictions(
        user_ids=np.asarray([3, 2**40], dtype=np.int64),
        positions=np.asarray([9, 1], dtype=np.int32),
        targets=np.asarray([5, 0], dtype=np.int32),
        ranks=np.asarray([2, 1], dtype=np.int32),
        history_lengths=np.asarray([9, 1], dtype=np.int32),
        train_counts=np.asarray([2**40, 0], dtype=np.int64),
        candidates=[np.asarray([5, 1, 2], dtype=np.int32), np.asarray([0, 7], dtype=np.int32)],
        scores=[np.asarray([-1.5, -0.25, -3.0], dtype=np.float32), np.asarray([-0.5, -np.inf], dtype=np.float32)],
    )
    written.write(tmp_path / "predictions.arrow")
    read = Predictions.read(tmp_path / "predictions.arrow")
    for name in ("user_ids", "positions", "targets", "ranks", "history_lengths", "train_counts"):
        assert getattr(read, name).tolist() == getattr(written, name).tolist(), name
        assert getattr(read, name).dtype == getattr(written, name).dtype, name
    assert [row.tolist() for row in read.candidates] == [[5, 1, 2], [0, 7]]
    assert [row.tolist() for row in read.scores] == [[-1.5, -0.25, -3.0], [-0.5, -np.inf]]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.arrow"]


def test_no_predictions_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rec-dist evaluate"):
        Predictions.read(tmp_path / "predictions.arrow")


def test_blocks_are_read_as_one(tmp_path: Path) -> None:
    """Rows of several blocks, empty lists and an empty block among them; by number, from the end, and in order."""
    lists = [[[1, 2], []], [], [[3]], [[4, 5, 6], [7]]]
    path = tmp_path / "predictions.arrow"
    with writing_predictions(path) as add:
        for block in lists:
            numbers = np.arange(len(block))
            columns = [numbers.astype(np.int64), *(numbers.astype(np.int32) for _ in range(4)), numbers.astype(np.int64)]
            items = [np.asarray(one, dtype=np.int32) for one in block]
            add(Predictions(*columns, candidates=items, scores=[-one.astype(np.float32) for one in items]))
    read, wanted = Predictions.read(path), [one for block in lists for one in block]
    assert read.user_ids.tolist() == [0, 1, 0, 0, 1]
    assert len(read.candidates) == len(read.scores) == 5
    assert [one.tolist() for one in read.candidates] == wanted
    assert [read.candidates[row].tolist() for row in range(-5, 5)] == wanted + wanted
    assert np.concatenate(read.scores).tolist() == [-1.0, -2.0, -3.0, -4.0, -5.0, -6.0, -7.0]
    with pytest.raises(IndexError):
        read.candidates[5]


def test_an_error_while_blocks_are_written_keeps_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "predictions.arrow"
    path.write_bytes(b"before")
    with pytest.raises(RuntimeError), writing_predictions(path):
        raise RuntimeError
    assert path.read_bytes() == b"before" and list(tmp_path.iterdir()) == [path]
