"""Compiles the kernels of liger-kernel that models.fused_layers uses, as compile_kernels.py does ours, at the shapes of large models.

A width of 4,096, heads of 128 with norms of q and k (Qwen3), and MLPs of 14,336 as in Llama 3.1 8B. Cost: a second a kernel.
"""

import json
import sys
from collections.abc import Iterator
from typing import Any

from compile_kernels import compiled, resources
from liger_kernel.ops import geglu, rms_norm, rope, swiglu
from liger_kernel.ops.utils import calculate_settings
from triton import language as tl

from rec_dist.models.fused_layers import FAMILIES

DTYPE = "*bf16"  # that of runs on GPUs
WIDTH, HEAD, INNER, HEADS, KEY_HEADS = 4096, 128, 14336, 32, 8
BLACKWELL = 100  # liger-kernel has SwiGLU kernels of its own for it
_ONES = {"W_row_stride": 1, "RSTD_row_stride": 1}  # which Triton takes as constants


def sources(chip: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """name, kernel, types, constants, warps, as the launch functions of liger-kernel pass them."""
    yield from _norms()
    yield from _products(chip)
    constants = {"bs": 1, "cos_bs": 1, "n_qh": HEADS, "n_kh": KEY_HEADS, "hd": HEAD, "pad_n_qh": HEADS, "pad_n_kh": KEY_HEADS}
    constants |= {"pad_hd": HEAD, "pad_rd": HEAD, "rd": HEAD, "BLOCK_SIZE": HEADS}
    types = dict.fromkeys(("q_ptr", "k_ptr", "cos", "sin"), DTYPE)
    types |= dict.fromkeys(("q_row_stride", "k_row_stride", "cos_row_stride", "sin_row_stride", "sl"), "i32")
    for back in (False, True):
        yield f"rope {'backward' if back else 'forward'}", rope._triton_rope, types, {**constants, "BACKWARD_PASS": back}, 4


def _norms() -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    pointers = dict.fromkeys(("Y_ptr", "X_ptr", "W_ptr", "dY_ptr", "dX_ptr"), DTYPE)
    pointers |= dict.fromkeys(("RSTD_ptr", "dW_ptr"), "*fp32") | dict.fromkeys(("eps", "offset"), "fp32")
    numbers = ("Y_row_stride", "X_row_stride", "dY_row_stride", "dX_row_stride", "dW_row_stride", "n_rows", "n_cols")
    types = pointers | dict.fromkeys((*numbers, "rows_per_program"), "i32")
    for casting in sorted({norm.casting for norm in FAMILIES.values()}):
        for width, kind in ((WIDTH, "norm"), (HEAD, "norm of heads")):
            block, warps = calculate_settings(width)
            known = {**_ONES, "casting_mode": rms_norm._str_to_casting_mode[casting], "elementwise_affine": True}
            known |= {"BLOCK_SIZE": block} | ({"BLOCK_ROW": 16} if width == HEAD else {})
            forward, backward = (
                (rms_norm._block_rms_norm_forward_kernel, rms_norm._block_rms_norm_backward_kernel)
                if width == HEAD
                else (rms_norm._rms_norm_forward_kernel, rms_norm._rms_norm_backward_kernel)
            )
            yield f"{kind} {casting} forward", forward, types, known, warps
            for trains in (False, True):
                more = {"X_dtype": tl.bfloat16, "COMPUTE_DW": trains} | ({} if trains else {"dW_ptr": None, "dW_row_stride": 0})
                yield f"{kind} {casting} backward{' trained' * trains}", backward, types, known | more, warps


def _products(chip: int) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    types = dict.fromkeys(("a_ptr", "b_ptr", "c_ptr", "dc_ptr", "a", "b", "c", "dc"), DTYPE)
    types |= {"stride": "i32", "n_cols": "i32", "gate_multiplier": "fp32"}
    block, warps = calculate_settings(INNER)
    known = {"n_cols": INNER, "BLOCK_SIZE": block}
    yield "geglu forward", geglu._geglu_tanh_forward_kernel, types, known, warps
    yield "geglu backward", geglu._geglu_tanh_backward_kernel, types, known, warps
    if chip >= BLACKWELL:
        block, warps = swiglu._swiglu_tile_settings(INNER)
        yield "swiglu forward", swiglu._swiglu_forward_kernel_tiled, types, {"BLOCK_SIZE": block}, warps
        yield "swiglu backward", swiglu._swiglu_backward_kernel_tiled, types, {"BLOCK_SIZE": block}, warps
    else:
        yield "swiglu forward", swiglu._swiglu_forward_kernel, types, known, warps
        yield "swiglu backward", swiglu._swiglu_backward_kernel, types, known, warps


def main(chips: list[int]) -> None:
    found = []
    for chip in chips:
        for name, kernel, types, constants, warps in sources(chip):
            known = {key: value for key, value in constants.items() if key in kernel.arg_names}
            rest = {key: value for key, value in types.items() if key not in known}
            # Pointers are aligned to 16 bytes, and strides and sizes multiples of 16.
            aligned = [key for key, value in rest.items() if value != "fp32" and key != "rows_per_program"]
            binary = compiled(kernel, rest, known, warps, chip, aligned)
            used = resources(binary.asm["cubin"]) | {"shared": binary.metadata.shared, "warps": warps}
            found.append({"kernel": name, "chip": chip, **used})
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(chip) for chip in sys.argv[1:]])
