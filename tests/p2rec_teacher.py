"""A teacher for tests of P2Rec. Its item embeddings show plainly which category each item belongs to. Cost: milliseconds."""

from pathlib import Path

import numpy as np

from rec_dist.data.artifacts.teacher import TopItems, write_teacher
from rec_dist.data.dataset.prepared_data import PreparedData

NUM_CATEGORIES = 4
# In the tiny data set item i is mostly followed by i + 7, and 23 * 7 = 1 modulo 80: a user stays in a category for 20 items.
CATEGORIES = np.arange(80) * 23 % 80 // 20


def write_p2rec_teacher(folder: Path, data: PreparedData) -> Path:
    """A teacher whose item embeddings lie in four corners, those of CATEGORIES. Its lists are empty."""
    folder.mkdir(parents=True)
    corners = np.asarray([[9, 0, 0], [0, 9, 0], [0, 0, 9], [-9, -9, -9]], dtype=np.float32)
    noise = np.random.default_rng(3).normal(size=(data.num_items, 3)).astype(np.float32)
    weights = folder / "model.safetensors"
    weights.write_bytes(b"weights")
    nothing = TopItems(np.zeros(0, np.int64), np.zeros(0, np.int64), np.zeros((0, 1), np.int32))
    write_teacher(
        folder,
        corners[CATEGORIES] + noise,
        [nothing],
        top_h=1,
        weights=weights,
        data_fingerprint=data.manifest.fingerprint,
    )
    return folder
