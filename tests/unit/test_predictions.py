"""Predictions read back as they were written, including ragged candidates."""

from pathlib import Path

import numpy as np
import pytest

from rec_dist.data.artifacts.predictions import Predictions
from rec_dist.errors import UserError


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    written = Predictions(
        user_ids=np.asarray([3, 2**40], dtype=np.int64),
        positions=np.asarray([9, 1], dtype=np.int32),
        targets=np.asarray([5, 0], dtype=np.int32),
        ranks=np.asarray([2, 1], dtype=np.int32),
        candidates=[np.asarray([5, 1, 2], dtype=np.int32), np.asarray([0, 7], dtype=np.int32)],
        scores=[np.asarray([-1.5, -0.25, -3.0], dtype=np.float32), np.asarray([-0.5, -np.inf], dtype=np.float32)],
    )
    written.write(tmp_path / "predictions.arrow")
    read = Predictions.read(tmp_path / "predictions.arrow")
    for name in ("user_ids", "positions", "targets", "ranks"):
        assert getattr(read, name).tolist() == getattr(written, name).tolist(), name
        assert getattr(read, name).dtype == getattr(written, name).dtype, name
    assert [row.tolist() for row in read.candidates] == [[5, 1, 2], [0, 7]]
    assert [row.tolist() for row in read.scores] == [[-1.5, -0.25, -3.0], [-0.5, -np.inf]]
    assert [path.name for path in tmp_path.iterdir()] == ["predictions.arrow"]


def test_no_predictions_are_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="rec-dist evaluate"):
        Predictions.read(tmp_path / "predictions.arrow")
