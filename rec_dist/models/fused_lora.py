"""LoRA with its second product added onto the base layer's output: y = W x + s B (A x) in three matrix products and nothing else.

Why: PEFT multiplies by s and adds in passes of their own over tensors as large as the layer's output, and multiplies once more in the
backward pass. They move memory and compute nothing: a training step of SmolLM2-135M's shape on two cores takes 3.44 s in place of 3.91
(docs/LOG.md; P = 512, K = 1 of benchmarks/peers.py). Cost: none; what is saved for the backward pass is the same.

The adapter stays PEFT's: same modules, same names, same weights. It is asked for one of its variants, which PEFT calls in place of its
own sum.
"""

from typing import Any

import torch
from torch import Tensor, nn


class _Onto(nn.Linear):
    """B of an adapter, as a module still, since ZeRO-3 gathers a weight when its module is called."""

    def forward(self, input: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """B input, or onto + scale B input; input (..., r), onto (..., O)."""
        if onto is None:
            return super().forward(input)
        whole = torch.addmm(onto.flatten(0, -2), input.flatten(0, -2), self.weight.t(), alpha=scale)
        return whole.view(onto.shape)


class _Fused:
    """What PEFT's layers call a variant. They must not be merged while they have it: `rec-dist export` builds its own."""

    @staticmethod
    def forward(module: Any, active_adapter: str, x: Tensor, result: Tensor, **_: Any) -> Tensor:
        """result (..., O) of the base layer -> with the adapter's part."""
        hidden: Tensor = module.lora_A[active_adapter](module.lora_dropout[active_adapter](x))
        scale, last = module.scaling[active_adapter], module.lora_B[active_adapter]
        alike = hidden.dtype == result.dtype
        whole: Tensor = last(hidden, result, scale) if alike else result + last(hidden) * scale
        return whole


def fuse_lora(model: nn.Module) -> None:
    """Makes every linear layer's plain LoRA adapters in `model`, a PEFT model, run this way; the result is the same to rounding."""
    from peft.tuners.lora import Linear

    for layer in model.modules():
        if not isinstance(layer, Linear):
            continue
        for name, last in layer.lora_B.items():
            if name not in layer.lora_variant and type(last) is nn.Linear and last.bias is None:
                last.__class__ = _Onto
                layer.lora_variant[name] = _Fused
