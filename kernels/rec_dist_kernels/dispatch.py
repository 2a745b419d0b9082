"""The one place that chooses an operation's implementation, so that "auto" means the same everywhere."""

import importlib.util
import os
from typing import Literal, TypeVar, get_args

import torch
from torch import Tensor

Impl = Literal["auto", "reference", "triton"]
Op = TypeVar("Op")

_TRITON_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def choose(op: str, impl: Impl, tensor: Tensor, *, reference: Op, triton: Op) -> Op:
    """The implementation of `op` that `impl` asks for, for inputs of the device and dtype of `tensor`.

    auto: triton for CUDA tensors of float32, bfloat16 or float16 where the package triton is installed, and
    else the reference: on a CPU plain PyTorch is faster, and the kernels accumulate in float32, which is not
    what float64 asks for.
    reference: plain PyTorch.
    triton: the fused kernel; on CPU tensors under TRITON_INTERPRET=1, set before the first call.

    Errors: ValueError if `impl` is unknown, or if it is "triton" and the kernel cannot run: an explicit
    choice is never replaced by another one.
    """
    if impl not in get_args(Impl):
        raise ValueError(f"impl={impl!r} of {op} is unknown; use one of {', '.join(get_args(Impl))}")
    if impl == "reference":
        return reference
    obstacle = _obstacle(tensor)
    if impl == "triton" and obstacle:
        raise ValueError(f'{op} cannot run impl="triton": {obstacle}; use impl="auto" or "reference"')
    if impl == "triton" or (tensor.device.type == "cuda" and not obstacle):
        return triton
    return reference


def _obstacle(tensor: Tensor) -> str | None:
    """Why no Triton kernel can take this tensor, or None."""
    spec = importlib.util.find_spec("triton")
    if spec is None or spec.origin is None:  # a folder of that name on the path is found too, and has no origin
        return "the package triton is not installed"
    if tensor.dtype not in _TRITON_DTYPES:
        return f"the kernels take float32, bfloat16 and float16, not {str(tensor.dtype).removeprefix('torch.')}"
    interpreted = os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on")
    if tensor.device.type != "cuda" and not interpreted:
        return f"the tensors are on {tensor.device}, and kernels run on CUDA, or on a CPU under TRITON_INTERPRET=1"
    return None
