"""Makes Triton's interpreter round to bfloat16 as a GPU does."""

from typing import Any

import numpy as np
import pytest
from triton import language as tl
from triton.runtime import interpreter

convert = interpreter._convert_float


def convert_to_nearest(values: Any, source: Any, target: Any, rounding_mode: Any) -> Any:
    """The interpreter truncates bfloat16, while a GPU rounds to the nearest even. That alone doubles every error."""
    if (source, target) != (tl.float32, tl.bfloat16):
        return convert(values, source, target, rounding_mode)
    bits = np.ascontiguousarray(values).view(np.uint32)
    nearest = (bits + np.uint32(0x7FFF) + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(values), 0x7FC0, nearest).astype(np.uint16)


def round_to_nearest(monkeypatch: pytest.MonkeyPatch) -> None:
    """Until the end of a test."""
    monkeypatch.setattr(interpreter, "_convert_float", convert_to_nearest)
