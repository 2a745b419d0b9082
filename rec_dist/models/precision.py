"""What model.dtype=auto stands for on a CPU: bfloat16 where the CPU multiplies it in hardware and faster, float32 elsewhere.

Why it is measured: AMX multiplies bfloat16 about 7 times as fast as float32, AVX512-BF16 up to twice as fast, and a CPU with
neither 90 times slower. Cost: nothing on a CPU without such instructions, else twenty matrix products, 0.1 s.
"""

import time
from dataclasses import dataclass
from pathlib import Path

import torch

# Flags of /proc/cpuinfo, the best first: Intel from Sapphire Rapids on, AMD from Zen 4 on, ARM from Graviton 3 on.
_INSTRUCTIONS = {"amx_bf16": "AMX", "avx512_bf16": "AVX512-BF16", "bf16": "BF16 of ARM"}
_SIZE = 768  # of the square matrices
_LEAST_SPEEDUP = 1.5  # below it, what bfloat16 saves in products goes into its casts


@dataclass(frozen=True)
class Choice:
    """dtype: a value of model.dtype. why: the reason, to follow the key and its value in a line of the log."""

    dtype: str
    why: str


ON_GPUS = Choice("bfloat16", "the workers have GPUs")


def choose_on_cpu() -> Choice:
    """The dtype for this machine's CPU."""
    name = bfloat16_instructions()
    if name is None:
        return Choice("float32", "this CPU has no instructions for bfloat16")
    speedup = _speedup()
    if speedup < _LEAST_SPEEDUP:
        return Choice("float32", f"this CPU multiplies bfloat16 ({name}) only {speedup:.1f} times as fast")
    return Choice("bfloat16", f"this CPU multiplies it {speedup:.1f} times as fast as float32 ({name})")


def bfloat16_instructions() -> str | None:
    """The name of the instructions with which this CPU multiplies bfloat16; None without any, or where /proc/cpuinfo is missing."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        return None
    lines = [line.partition(":")[2].split() for line in text.splitlines() if line.startswith(("flags", "Features"))]
    flags = set(lines[0]) if lines else set()
    return next((name for flag, name in _INSTRUCTIONS.items() if flag in flags), None)


def _speedup() -> float:
    """How many times as fast a product is in bfloat16. The best of ten products each, in turns, so that other work counts little."""
    generator = torch.Generator().manual_seed(0)  # its own, so that the caller's draws stay what they are
    matrices = torch.randn(2, _SIZE, _SIZE, generator=generator)
    pairs = {dtype: matrices.to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    best = dict.fromkeys(pairs, float("inf"))
    for _ in range(10):
        for dtype, (left, right) in pairs.items():
            began = time.perf_counter()
            torch.mm(left, right)
            best[dtype] = min(best[dtype], time.perf_counter() - began)
    return best[torch.float32] / best[torch.bfloat16]
