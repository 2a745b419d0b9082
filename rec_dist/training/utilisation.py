"""MFU of a step as it is trained: its floating-point operations over what the devices could have done in its time.

Cost: one count of the weights; where no data sheet names the device's peak, five matrix products at the start (CPU: 0.2 s).
"""

import time
from collections.abc import Callable

import torch
from torch import nn

from rec_dist.models.size import count_weights
from rec_dist.runtime.world import World
from rec_dist.training import flops

Utilisation = Callable[[int, int, float], float | None]  # (tokens, scored tokens, seconds) of a step, over all ranks
_GEMM = {"cpu": 1024, "cuda": 8192}  # side of the square matrices a peak is measured with


def utilisation_of(module: nn.Module, dtype: torch.dtype, world: World) -> Utilisation:
    """MFU of this run's steps, for rank 0, which writes them down; None on other ranks, and where operations are not counted.

    The head counts once a scored token; completions that share the row of their completion point make that too many by K rows a group.
    """
    weights = count_weights(module) if world.is_main else None
    if weights is None:
        return lambda tokens, scored, seconds: None
    peak, _ = peak_flops(world.device, dtype)
    count = {"frozen": weights.frozen, "training": weights.training, "head": weights.head}

    def of_step(tokens: int, scored: int, seconds: float) -> float:
        return flops.utilisation(
            flops.step_flops(tokens, scored, **count, head_trains=weights.head_trains), seconds, peak, world.size
        )

    return of_step


def peak_flops(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, where it is from): a data sheet where the device is known in bfloat16, else a matrix product timed here."""
    on_gpu = device.startswith("cuda")
    if on_gpu and dtype == torch.bfloat16:
        known = flops.known_peak(torch.cuda.get_device_name(device))
        if known is not None:
            return known
    size = _GEMM["cuda" if on_gpu else "cpu"]
    generator = torch.Generator(device).manual_seed(0)  # its own, so that the run's draws stay what they are
    a, b = (torch.randn(size, size, dtype=dtype, device=device, generator=generator) for _ in range(2))
    best = float("inf")
    for _ in range(5):
        began = time.perf_counter()
        torch.mm(a, b)
        if on_gpu:
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began)
    name = str(dtype).removeprefix("torch.")
    return (
        2 * size**3 / best,
        f"measured: {name} product of {size} x {size} matrices, best of 5, {torch.get_num_threads()} threads",
    )
