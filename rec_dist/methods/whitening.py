"""Whitening: the linear map after which the vectors of a catalogue have no correlations and the variance 1 in every direction.

    mean, C    of the rows of X, C = V diag(l) V^T with l_1 >= l_2 >= ...
    z = (x - mean) V_W diag(l_1 .. l_W) ** -1/2

States of a language model lie in a narrow cone, where every cosine is near 1; whitening spreads them (Su et al., arXiv
2103.15316). Sums run in float64, block by block, and hold D * D numbers. The sign of a direction is arbitrary; here its entry of
largest magnitude is positive.

I items, D width of the vectors, W directions that are kept.
"""

from collections.abc import Sequence

import numpy as np

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import F32, F64


def strongest_directions(blocks: Sequence[F32], width: int, *, key: str) -> tuple[F64, F64, F64]:
    """blocks (n, D) of X in order -> mean (D,), V_W (D, W) with the strongest direction first, and the variances (W,).

    Raises UserError that names `key`, the width's, if X has fewer than W directions or a value that is not finite.
    """
    num_items, source = sum(len(block) for block in blocks), blocks[0].shape[1]
    mean = sum(block.sum(axis=0, dtype=np.float64) for block in blocks) / num_items  # (D,)
    covariance = np.zeros((source, source))
    for block in blocks:
        centred = block - mean
        covariance += centred.T @ centred
    if not np.isfinite(covariance).all():
        raise UserError(f"{key}: the item vectors hold values that are not finite; make them again with model.dtype=float32")
    variances, directions = np.linalg.eigh(covariance / num_items)  # ascending
    known = int((variances > variances[-1] * source * np.finfo(np.float64).eps).sum())
    if width > (most := min(known, num_items - 1)):
        raise UserError(
            f"{key} ({width}) is more than the {most} directions in which {num_items} item vectors of width {source} differ; lower it"
        )
    chosen = directions[:, ::-1][:, :width]  # (D, W)
    signs = np.sign(chosen[np.abs(chosen).argmax(axis=0), np.arange(width)])
    return mean, chosen * signs, variances[::-1][:width]


def whitening(blocks: Sequence[F32], width: int, *, key: str) -> tuple[F64, F64]:
    """blocks (n, D) of X in order -> mean (D,) and the map (D, W). Raises UserError as strongest_directions."""
    mean, directions, variances = strongest_directions(blocks, width, key=key)
    return mean, directions / np.sqrt(variances)


def whitened(block: F32, mean: F64, directions: F64) -> F32:
    """The rows of a block (n, D), whitened and scaled to length 1: (n, W). A row at the mean stays 0."""
    values = (block - mean) @ directions
    lengths = np.linalg.norm(values, axis=1, keepdims=True)
    return (values / np.where(lengths > 0, lengths, 1.0)).astype(np.float32)
