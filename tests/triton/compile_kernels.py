"""Compiles every kernel for NVIDIA chips that need not be present, and prints what the assembler reports of each, as JSON.

This is a script and not a test module: a process that interprets kernels cannot compile them. Cost: about a second a kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from rec_dist_kernels import triton_boundary as boundary
from rec_dist_kernels import triton_logits as logits
from rec_dist_kernels import triton_preference as preference

ITEM_BYTES = {"bf16": 2, "fp32": 4}
# Pointers that PyTorch aligns to 16 bytes and numbers that are multiples of 16, as the launcher finds them.
ALIGNED = ("logits_ptr", "bias_ptr", "values_ptr", "scaled_ptr", "stride", "size")


def sources(dtype: str) -> Iterator[tuple[str, Any, dict[str, str], dict[str, Any], int]]:
    """name, kernel, types, constants, warps, as the launch functions of the two files pass them."""
    tokens = {"order_ptr": "*i64", "starts_ptr": "*i64", "targets_ptr": "*i64", "lse_ptr": "*fp32", "vocabulary": "i32"}
    for with_all in (True, False):
        head = {"logits_ptr": f"*{dtype}", "stride": "i32", "softcap": "fp32", **tokens}
        head |= {"bias_ptr": f"*{dtype}"} if with_all else {}
        flags: dict[str, Any] = {"HAS_BIAS": with_all, "HAS_CAP": with_all} | ({} if with_all else {"bias_ptr": None})
        suffix = " bias softcap" if with_all else ""
        lse = {**flags, "BLOCK": logits.LSE_BLOCK, "LANES": 16 // ITEM_BYTES[dtype], "TOKENS": logits.TOKENS_BLOCK}
        yield f"token_logps{suffix}", logits.token_logps_kernel, head | {"logps_ptr": "*fp32"}, lse, logits.LSE_WARPS
        slope = {**flags, "BLOCK": logits.GRADIENT_BLOCK}
        types = head | {"owners_ptr": "*i64", "grads_ptr": "*fp32"}
        yield f"logits_gradient{suffix}", logits.logits_gradient_kernel, types, slope, logits.GRADIENT_WARPS
        if with_all:
            sums = types | {"rows": "i32", "sums_ptr": "*fp32"}
            yield "bias_gradient", logits.bias_gradient_kernel, sums, flags | {"BLOCK": logits.BIAS_BLOCK}, logits.BIAS_WARPS
    scaled = {"values_ptr": f"*{dtype}", "scaled_ptr": f"*{dtype}", "factor_ptr": "*fp32", "size": "i64"}
    yield "scale", logits.scale_kernel, scaled, {"BLOCK": logits.SCALE_BLOCK}, 4
    sums = {"logps_ptr": "*fp32", "offsets_ptr": "*i64", "sums_ptr": "*fp32"}
    yield "completion_sums", logits.completion_sums_kernel, sums, {"BLOCK": logits.COMPLETION_BLOCK}, 1
    groups = {"policy_ptr": f"*{dtype}", "reference_ptr": f"*{dtype}", "offsets_ptr": "*i64", "loss_ptr": "*fp32"}
    groups |= {"rewards_ptr": "*fp32", "slopes_ptr": "*fp32", "beta": "fp32"}
    arrays = {"lengths_ptr": "*i64", "margins_ptr": "*fp32", "shares_ptr": "*fp32"}
    for kind, pool in preference.POOLS.items():
        used = {"margins_ptr": kind == "sdpo", "lengths_ptr": kind == "mppo", "shares_ptr": kind == "dynamicpo"}
        constants: dict[str, Any] = {name: None for name, there in used.items() if not there}
        constants |= {"POOL": pool, "LIKELIHOOD": kind == "mppo", "HAS_MARGINS": kind == "sdpo", "BLOCK": preference.GROUP_BLOCK}
        yield f"preference {kind}", preference.preference_kernel, groups | arrays, constants, 1
    shares = {"policy_ptr": f"*{dtype}", "offsets_ptr": "*i64", "shares_ptr": "*fp32"}
    numbers = {"MARGIN": boundary.MARGIN, "SWING": boundary.SWING, "ROUNDS": boundary.ROUNDS, "BLOCK": boundary.GROUP_BLOCK}
    yield "boundary", boundary.boundary_kernel, shares, numbers, 1
    back = {"slopes_ptr": "*fp32", "weights_ptr": "*fp32", "offsets_ptr": "*i64", "grads_ptr": f"*{dtype}"}
    yield "spread", preference.spread_kernel, back, {"BLOCK": preference.GROUP_BLOCK}, 1


def compiled(
    kernel: Any,
    types: dict[str, str],
    constants: dict[str, Any],
    warps: int,
    chip: int,
    aligned: Collection[str] = ALIGNED,
) -> Any:
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types[name] for name in names}
    attrs = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned if types.get(name) and name in names}
    values = {(names.index(name),): value for name, value in constants.items()}
    target = GPUTarget("cuda", chip, 32)
    return triton.compile(ASTSource(kernel, signature, values, attrs), target=target, options={"num_warps": warps})


def shown(tool: str, option: str, cubin: bytes) -> str:
    """What one of NVIDIA's tools, which triton includes, prints of a kernel."""
    path = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / tool
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        return subprocess.run([path, option, file.name], capture_output=True, text=True, check=True).stdout


def resources(cubin: bytes) -> dict[str, int]:
    """REG is a thread's and SHARED a block's use; STACK and LOCAL hold spills."""
    found = re.findall(r"\b(REG|STACK|SHARED|LOCAL):(\d+)", shown("cuobjdump", "--dump-resource-usage", cubin))
    return {name: int(value) for name, value in found}


def main_loop(cubin: bytes) -> dict[str, int]:
    """Instructions of the loop with most exponentials, from a label to a branch back to it, and how many are of three kinds.

    All are 0 for a kernel without loops.
    """
    code: list[str] = []
    labels: dict[str, int] = {}
    loops: list[list[str]] = [[]]
    for line in shown("nvdisasm", "--print-code", cubin).splitlines():
        if label := re.match(r"(\.L\w+):", line):
            labels[label[1]] = len(code)
        elif instruction := re.match(r"\s*/\*[0-9a-f]{4,}\*/\s+(.*);", line):
            code.append(instruction[1])
            target = re.search(r"\bBRA\b.*`\((\.L\w+)\)", instruction[1])
            if target and target[1] in labels:
                loops.append(code[labels[target[1]] :])
    kinds = {"exponentials": r"\bMUFU\.EX2\b", "barriers": r"\bBAR\b", "shuffles": r"\bSHFL\b"}
    count = lambda loop, pattern: sum(bool(re.search(pattern, line)) for line in loop)
    loop = max(loops, key=lambda loop: count(loop, kinds["exponentials"]))
    return {"instructions": len(loop), **{kind: count(loop, pattern) for kind, pattern in kinds.items()}}


def main(chips: list[int]) -> None:
    found = []
    for chip in chips:
        for dtype in ITEM_BYTES:
            for name, kernel, types, constants, warps in sources(dtype):
                binary = compiled(kernel, types, constants, warps, chip)
                used = resources(binary.asm["cubin"]) | {"shared": binary.metadata.shared, "warps": warps}
                wide = len(re.findall(r"ld\.global[^;]*\.v[24]", binary.asm["ptx"]))
                loop = main_loop(binary.asm["cubin"])
                found.append({"kernel": name, "dtype": dtype, "chip": chip, "wide_loads": wide, "loop": loop, **used})
    print(json.dumps(found))


if __name__ == "__main__":
    main([int(chip) for chip in sys.argv[1:]])
