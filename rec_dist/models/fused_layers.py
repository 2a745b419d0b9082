"""RMSNorm, SwiGLU (or GEGLU) and RoPE as one kernel each, from Liger-Kernel, in place of transformers' chains of operations.

Why: these layers do little arithmetic, and every operation of a chain reads and writes tensors as large as the layer's input or
larger; autograd keeps some of them for the backward pass. Cost: none in memory; the kernels compile in the first step.

A layer gets a subclass of its class with another forward pass. Its weights, submodules, hooks and names stay, so LoRA, ZeRO and
saved files do not change, nothing outside the model does, and `plain_layers` can undo it for a comparison. Only Liger's autograd
functions are used. Its own patches (liger_kernel.transformers) replace classes and functions in the modules of transformers,
for every model of the process, and the head and loss, which are ours.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError
from rec_dist.models.probe import check_same

ROPE = "apply_rotary_pos_emb"  # the global that an attention layer of transformers calls


@dataclass(frozen=True)
class Norm:
    """How a family's RMSNorm computes: (offset + weight) * x / rms(x), with `eps` the name of its epsilon.

    casting: Liger's word. llama: rounds x / rms(x) to the model's dtype before the product with the weight. gemma: after it.
    """

    offset: float
    casting: str
    eps: str


_LLAMA, _GEMMA = Norm(0.0, "llama", "variance_epsilon"), Norm(1.0, "gemma", "eps")
# By config.model_type. tests/triton/interpreted_layers.py compares each with float64, the output and every gradient.
FAMILIES = {
    **dict.fromkeys(("llama", "mistral", "ministral", "qwen2", "qwen3", "smollm3"), _LLAMA),
    **dict.fromkeys(("gemma", "gemma2", "gemma3_text"), _GEMMA),
}


def wants_fused(wanted: str, config: Any, *, device: str) -> bool:
    """Whether to fuse the layers of a model with this transformers configuration; wanted: model.fused_layers.

    auto: no, until benchmarks/gpu_suite.py has shown on a GPU that results are equal. Raises UserError if `liger` cannot work.
    """
    if wanted != "liger":
        return False
    leave = "or set model.fused_layers=none"
    if not device.startswith("cuda"):
        raise UserError(f"model.fused_layers=liger needs a CUDA device, and this run is on {device}; set model.fused_layers=none")
    if find_spec("liger_kernel") is None:
        raise UserError(
            "model.fused_layers=liger needs the package liger-kernel, which is not installed; run "
            f"`pip install liger-kernel` on every node, {leave}"
        )
    if config.model_type not in FAMILIES:
        raise UserError(
            f"model.fused_layers=liger does not know models of type {config.model_type}, only {', '.join(FAMILIES)}; "
            "set model.fused_layers=none"
        )
    return True


def notes_on_layers(wanted: str, device: str) -> list[str]:
    """What the log says of model.fused_layers=auto on a GPU."""
    if wanted != "auto" or not device.startswith("cuda"):
        return []
    return [
        "model.fused_layers=auto leaves RMSNorm, SwiGLU and RoPE as transformers has them; liger fuses them, which has not "
        "been measured on a GPU yet"
    ]


def fuse_layers(model: Any) -> None:
    """Makes the layers of a transformers model of one of FAMILIES run fused. Call it before an adapter wraps the model.

    Needs liger-kernel, and to run, CUDA or TRITON_INTERPRET=1. Raises UserError for an activation that has no fused kernel.
    """
    norm = FAMILIES[model.config.model_type]
    for layer in model.modules():
        kind: Any = type(layer)
        if kind.__module__ != type(model).__module__:
            continue
        if kind.__name__.endswith("RMSNorm"):
            layer.__class__ = _fused(kind, _norm_forward(norm))
        elif kind.__name__.endswith("MLP"):
            activation: Any = type(layer.act_fn)
            layer.__class__ = _fused(kind, _gated_forward(activation))
        elif kind.__name__.endswith("Attention"):
            layer.__class__ = _fused(kind, _attention_forward(kind))


def fused_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of `model`, at any depth, that fuse_layers has changed."""
    return [layer for layer in model.modules() if isinstance(layer, _Fused)]


@contextmanager
def plain_layers(model: nn.Module) -> Iterator[None]:
    """Inside, the fused layers of `model` run as transformers wrote them."""
    layers = fused_layers(model)
    fused = [type(layer) for layer in layers]
    for layer in layers:
        layer.__class__ = type(layer).plain  # type: ignore[attr-defined]
    try:
        yield
    finally:
        for layer, own in zip(layers, fused, strict=True):
            layer.__class__ = own


def check_fused(model: nn.Module, score: Callable[[], Tensor], dtype: torch.dtype) -> None:
    """Raises UserError if `score` gives something else with the fused layers of `model` than without them.

    Calls it twice on every rank, or not at all if `model` has no fused layers. dtype: the model's.
    """
    if not fused_layers(model):
        return
    fused = score()
    with plain_layers(model):
        plain = score()
    way_out = "more than rounding does; set model.fused_layers=none"
    check_same(fused, plain, dtype, what="results change", when="layers run fused", key="model.fused_layers", way_out=way_out)


class _Fused:
    """Marks the classes that `_fused` makes. plain: the class of transformers below."""

    plain: type[nn.Module]


@cache
def _fused(plain: type[nn.Module], forward: Callable[..., Any]) -> type[nn.Module]:
    return type(f"Fused{plain.__name__}", (_Fused, plain), {"plain": plain, "forward": forward})


@cache
def _norm_forward(norm: Norm) -> Callable[..., Any]:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    def forward(self: Any, hidden_states: Tensor) -> Tensor:
        # Not in place: that writes the gradient of x over that of the result, which a norm behind a layer (Gemma 2 and 3)
        # shares with the residual stream.
        in_place, row_mode = False, None
        result: Tensor = LigerRMSNormFunction.apply(
            hidden_states, self.weight, getattr(self, norm.eps), norm.offset, norm.casting, in_place, row_mode
        )
        return result

    return forward


@cache
def _gated_forward(activation: type[nn.Module]) -> Callable[..., Any]:
    from transformers.activations import ACT2FN

    if activation is type(ACT2FN["silu"]):
        from liger_kernel.ops.swiglu import LigerSiLUMulFunction as Product
    elif activation is type(ACT2FN["gelu_pytorch_tanh"]):
        from liger_kernel.ops.geglu import LigerGELUMulFunction as Product
    else:
        raise UserError(f"model.fused_layers=liger has no kernel for {activation.__name__}; set model.fused_layers=none")

    def forward(self: Any, x: Tensor) -> Tensor:
        # The backward pass writes both gradients over its inputs, which no one else keeps: they come from linear layers.
        result: Tensor = self.down_proj(Product.apply(self.gate_proj(x), self.up_proj(x)))
        return result

    return forward


@cache
def _attention_forward(attention: type[nn.Module]) -> Callable[..., Any]:
    """The forward pass of `attention` with the same code, over a copy of its module's globals in which RoPE is the fused one."""
    plain = attention.forward
    assert isinstance(plain, FunctionType) and ROPE in plain.__code__.co_names, f"{attention.__name__} calls no {ROPE}"
    own = {**plain.__globals__, ROPE: _rope}
    forward = FunctionType(plain.__code__, own, plain.__name__, plain.__defaults__, plain.__closure__)
    forward.__kwdefaults__ = plain.__kwdefaults__
    return forward


def _rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """q (1, H, T, d) and k (1, H / n, T, d), rotated; cos, sin (1, T, d), by the position of each row.

    Rotates in the memory of q and k, which no one else keeps: they come from linear layers or norms.
    """
    from liger_kernel.ops.rope import LigerRopeFunction

    rotated: tuple[Tensor, Tensor] = LigerRopeFunction.apply(q, k, cos, sin)
    return rotated
