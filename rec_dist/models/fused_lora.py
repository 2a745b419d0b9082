"""LoRA whose second product accumulates into the base layer's output: y = W x + s B (A x) in just three matrix products.

Why: PEFT scales by s and adds in separate passes over tensors as large as the layer's output, and scales once more in the
backward pass. These passes only move memory. Without them a training step of SmolLM2-135M's shape on two cores takes 3.44 s
in place of 3.91 (docs/LOG.md; P = 512, K = 1 of benchmarks/peers.py). Cost: none; the backward pass saves the same tensors.

The products run in the dtype of the layer's input. A float32 adapter on a bfloat16 model is cast for them, and its gradient
comes back in float32; PEFT would cast the input instead, and multiply in float32.

The adapter remains PEFT's: same modules, names and weights. This file registers a LoRA variant, which PEFT calls in place of
its sum.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _In(nn.Linear):
    """The matrix A of an adapter. It is still a module, because ZeRO-3 gathers a weight when its module is called."""

    def forward(self, input: Tensor) -> Tensor:
        """A input, in the dtype of input (..., I)."""
        return nn.functional.linear(input, self.weight.to(input.dtype))


class _Onto(nn.Linear):
    """The matrix B of an adapter."""

    def forward(self, input: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """B input, or onto + scale B input, in the dtype of input (..., r); onto (..., O)."""
        weight = self.weight.to(input.dtype)
        if onto is None:
            return nn.functional.linear(input, weight)
        whole = torch.addmm(onto.flatten(0, -2), input.flatten(0, -2), weight.t(), alpha=scale)
        return whole.view(onto.shape)


class _Fused:
    """A variant, in PEFT's terms. Layers with it cannot be merged; `rec-dist export` builds its own."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """result (..., O) of the base layer -> result plus the adapter's output."""
        hidden: Tensor = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        scale, last = module.scaling[active_adapter], module.lora_B[active_adapter]
        alike = hidden.dtype == result.dtype
        whole: Tensor = last(hidden, result, scale) if alike else result + last(hidden) * scale
        return whole


def fuse_lora(model: nn.Module) -> None:
    """Makes the plain LoRA adapters of all linear layers in the PEFT model `model` run this way.

    Results are equal to rounding.
    """
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        for name, last in layer.lora_B.items():
            first = layer.lora_A[name]
            plain = all(type(matrix) is nn.Linear and matrix.bias is None for matrix in (first, last))
            if name not in layer.lora_variant and plain:
                first.__class__, last.__class__ = _In, _Onto
                layer.lora_variant[name] = _Fused
        # Where an adapter is left to PEFT, its input must have the dtype of its weights.
        layer.cast_input_dtype_enabled = any(type(last) is not _Onto for last in layer.lora_B.values())
