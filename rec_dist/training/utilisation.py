"""MFU of a training step: its floating-point operations over what the devices could have done in the same time.

Cost: one count of the weights, and five matrix products at the start (CPU: 0.2 s) when no data sheet gives the device's
peak.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import nn

from rec_dist.models.scorer import Scorer
from rec_dist.models.size import count_weights
from rec_dist.runtime.world import World
from rec_dist.training import flops

# (tokens, scored tokens, seconds) of a step over all ranks, and this rank's batches -> MFU
Utilisation = Callable[[int, int, float, Sequence[Any]], float | None]
_GEMM = {"cpu": 1024, "cuda": 8192}  # side of the square matrices a peak is measured with


def head_share(batches: Iterable[Any], vocab_size: int) -> float:
    """The logits that the head computes for these batches, over those of whole rows of the vocabulary.

    Below 1 where each token competes with what some title goes on with (PackedBatch.allowed); 1 for any other batch.
    """
    plans = [plan for batch in batches if (plan := getattr(batch, "allowed", None)) is not None and batch.num_groups]
    sizes = [(chunk.choices, chunk.words) for plan in plans for chunk in plan.chunks]
    computed = sum((choices.stop - choices.start) * (words.stop - words.start) for choices, words in sizes)
    whole = vocab_size * sum(choices.stop - choices.start for choices, _ in sizes)
    return computed / whole if whole else 1.0


def utilisation_of(module: nn.Module, dtype: torch.dtype, world: World) -> Utilisation:
    """Return a function that gives the MFU of a step; it gives None when the operations of this module are not counted.

    The head counts once for each scored token. That is too many by K rows a group, since completions share the row of
    their branch point. Where tokens compete with what titles go on with, this rank's batches say for how much of the vocabulary.
    """
    weights = count_weights(module)
    if weights is None:
        return lambda tokens, scored, seconds, batches: None
    peak, _ = peak_flops(world.device, dtype)
    count = {"frozen": weights.frozen, "training": weights.training, "head": weights.head}

    def of_step(tokens: int, scored: int, seconds: float, batches: Sequence[Any]) -> float:
        assert isinstance(module, Scorer)
        rows = round(scored * head_share(batches, module.vocab_size))
        done = flops.step_flops(tokens, rows, **count, head_trains=weights.head_trains)
        return flops.utilisation(done, seconds, peak, world.size)

    return of_step


def peak_flops(device: str, dtype: torch.dtype) -> tuple[float, str]:
    """(FLOP/s, its source): a data sheet's for a known device in bfloat16, else that of a matrix product timed here."""
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
