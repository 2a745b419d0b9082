"""Fused RMSNorm, SwiGLU and RoPE (rec_dist/models/fused_layers.py) against transformers' own layers: results, time and memory.

Results: the hidden states of a model and the gradient of each of its weights, as vectors. Truth is the same model in float64, but
for its norms, which transformers computes in float32; plain and fused run in one dtype. Roundings add up over layers, so the rule
of benchmarks/acceptance.py, which is for one operation, holds here for lengths of vectors: |truth - fused| <= |truth - plain| +
tolerance, relative to |truth|.
"""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.acceptance import TOLERANCE
from benchmarks.gpu_attention import SHAPE, SMALL
from benchmarks.gpu_peers import LLAMA_8B
from benchmarks.gpu_rows import Place, Row, Suite
from benchmarks.gpu_step import check_fused_layers
from benchmarks.peer_methods import Shape, build_model

Fuse = Callable[[nn.Module], None]


def not_fused(model: nn.Module) -> None:
    """Leaves the layers as transformers has them."""


def the_fusion(device: str) -> Fuse:
    """fuse_layers. Raises NotMeasuredError where Liger's kernels cannot run."""
    check_fused_layers(device)
    from rec_dist.models.fused_layers import fuse_layers

    fuse: Fuse = fuse_layers
    return fuse


def outcome(shape: Shape, weights: torch.dtype, dtype: torch.dtype, device: str, fuse: Fuse) -> list[Tensor]:
    """The last hidden states (T, D) and the gradient of each weight, in float64. weights: what they are rounded to first."""
    model: Any = build_model(shape, lora=False, dtype=torch.float32, device=device).to(weights).to(dtype)
    fuse(model)
    ids = torch.randint(1, shape.vocab, (1, 200), generator=torch.Generator().manual_seed(0)).to(device)
    hidden = model.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
    (hidden * torch.linspace(0.5, 1.5, hidden.shape[1], dtype=dtype, device=device)).sum().backward()
    gradients = [weight.grad for _, weight in model.named_parameters() if weight.grad is not None]
    return [found.detach().double() for found in (hidden, *gradients)]


def check(place: Place, dtype: torch.dtype, fuse: Fuse) -> Row:
    """How far plain and fused are from truth at most, and the largest excess of fused in tolerances: accepted up to 1."""
    shape, device = SMALL if place.tiny else SHAPE, place.device
    truth = outcome(shape, dtype, torch.float64, device, not_fused)
    plain, fused = (outcome(shape, dtype, dtype, device, how) for how in (not_fused, fuse))
    errors = [(_apart(a, exact), _apart(b, exact)) for exact, a, b in zip(truth, plain, fused, strict=True)]
    return {
        "results": len(errors),
        "plain from truth": max(error for error, _ in errors),
        "fused from truth": max(error for _, error in errors),
        "excess in tolerances": max((own - other) / TOLERANCE[dtype] for other, own in errors),
    }


def _apart(found: Tensor, truth: Tensor) -> float:
    return float((found - truth).norm() / truth.norm())


def speed(suite: Suite, fuse: Fuse) -> Row:
    """Forward and backward through a few layers of the 8B shape, in which the weights take no gradients."""
    place = suite.place
    shape = SMALL if place.tiny else replace(LLAMA_8B, layers=4, vocab=1024)
    model: Any = build_model(shape, lora=False, dtype=place.dtype, device=place.device).requires_grad_(False)
    fuse(model)
    rows = 64 if place.tiny else 8192
    start = torch.randn(1, rows, shape.hidden, device=place.device, dtype=place.dtype).requires_grad_()

    def step() -> None:
        model.base_model(inputs_embeds=start, use_cache=False).last_hidden_state.sum().backward()

    def clear() -> None:
        start.grad = None

    return {"rows": rows, **suite.time(step, clear=clear)}


def run(suite: Suite) -> None:
    """A row of results for each dtype, then the speed of plain and fused layers."""
    for dtype in (torch.bfloat16, torch.float32) if suite.place.on_gpu else (torch.float32,):
        about = {"method": "results", "dtype": str(dtype).removeprefix("torch.")}
        suite.row(about, 5.0, lambda dtype=dtype: check(suite.place, dtype, the_fusion(suite.place.device)))  # type: ignore[misc]
    dtype_name = str(suite.place.dtype).removeprefix("torch.")
    suite.row({"method": "plain layers", "dtype": dtype_name}, 5.0, lambda: speed(suite, not_fused))
    suite.row({"method": "fused layers", "dtype": dtype_name}, 5.0, lambda: speed(suite, the_fusion(suite.place.device)))
