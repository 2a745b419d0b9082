"""What the checks of a model that we did not write share: tokens to try it with, and the comparison of two results."""

import numpy as np
import torch
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.runtime.arrays import I32


def probe_tokens(vocab_size: int) -> I32:
    """(64,) ids below `vocab_size`, spread over it; the same on every call."""
    return ((np.arange(64, dtype=np.int64) * 7919 + 13) % max(vocab_size - 1, 1)).astype(np.int32)


_NO_MASK = "so the model does not keep to the mask; choose a decoder such as Llama, Qwen, Gemma or GPT-2"


def check_same(
    found: Tensor,
    expected: Tensor,
    dtype: torch.dtype,
    *,
    what: str,
    when: str,
    key: str = "model.path",
    way_out: str = _NO_MASK,
) -> None:
    """Raises UserError if two results of one shape are not finite, or differ by more than rounding in `dtype`.

    The message says that `what` changes `when`, and ends with `way_out`. key: how the user named the model.
    """
    tolerance = 1e-3 if dtype == torch.float32 else 5e-2
    difference = float((found - expected).norm())
    if not np.isfinite(difference):
        float32 = "load it in float32" if key == "model" else "set model.dtype=float32"
        raise UserError(f"{key}: this model computes values that are not finite; {float32}, or choose another model")
    if not difference <= tolerance * (1 + float(expected.norm())):
        raise UserError(f"{key}: {what} by {difference:.3g} when {when}, {way_out}")
