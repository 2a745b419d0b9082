"""What the checks of a foreign model share: tokens to try it with, and the verdict on what it made of them in company and alone."""

import numpy as np
import torch
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32


def probe_tokens(vocab_size: int) -> I32:
    """(64,) ids below `vocab_size`, spread over it; always the same."""
    return ((np.arange(64, dtype=np.int64) * 7919 + 13) % max(vocab_size - 1, 1)).astype(np.int32)


def check_same(together: Tensor, alone: Tensor, dtype: torch.dtype, *, what: str, when: str) -> None:
    """UserError where two results of one shape are not finite, or differ by more than rounding in `dtype`: `what` changes `when`."""
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    difference = float((together - alone).norm())
    if not np.isfinite(difference):
        raise UserError("model.path: what this model computes is not finite; set model.dtype=float32, or name another model")
    if not difference <= tolerance * (1 + float(alone.norm())):
        raise UserError(
            f"model.path: {what} by {difference:.3g} when {when}, so its attention does not keep to the mask; choose a decoder such "
            "as Llama, Qwen, Gemma or GPT-2"
        )
