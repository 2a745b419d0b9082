"""Initial item embeddings of a recommender: a language model's vectors (P2Rec), reduced to its width by PCA.

    Z = (X - mean) V_k s,  V_k the k eigenvectors of the covariance of X with the largest eigenvalues,  s so that std(Z) = k **
    -0.5

Sums run in float64, block by block, and hold D * D numbers beside the result for a catalogue of any size. The sign of a component
is arbitrary; here its entry of largest magnitude is positive. One s for all components keeps their relative size, and gives the
table the scale of a random one (methods/sequential/item_embedding.py), so that the two differ in more than scale.

I items, D width of the vectors, k width of the recommender.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from rec_dist.data.artifacts.embeddings import read_embeddings
from rec_dist.data.artifacts.matrices import F32
from rec_dist.methods.sequential.item_embedding import initial_std
from rec_dist.methods.whitening import strongest_directions


def initial_items(folder: Path, *, data_fingerprint: str, width: int) -> Tensor:
    """(I, k) float32 from the folder that `rec-dist embed` wrote.

    Raises UserError as read_embeddings() and principal_components().
    """
    scores = principal_components(read_embeddings(folder, data_fingerprint=data_fingerprint), width)
    return torch.from_numpy((scores * (initial_std(width) / scores.std())).astype(np.float32))


def principal_components(blocks: Sequence[F32], width: int) -> np.ndarray[tuple[int, int], np.dtype[np.float64]]:
    """blocks (n, D) of X in order -> the first k principal components of its rows, (I, k), largest first.

    Raises UserError as strongest_directions.
    """
    mean, directions, _ = strongest_directions(blocks, width, key="task.sequential.width")
    return np.concatenate([(block - mean) @ directions for block in blocks])
