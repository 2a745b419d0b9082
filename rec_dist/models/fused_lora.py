"""LoRA that accumulates: y = W x + s B (A x) in three matrix products, and their gradient of x in two, without sums around them.

Why: PEFT scales by s and adds in separate passes over tensors as large as the layer's output, scales once more in the backward
pass, and autograd then adds the two gradients of x, W' dy and A' (s B' dy), each as large as the layer's input. These passes
only move memory. In the forward pass the second product accumulates into the first: a training step of SmolLM2-135M's shape on
two cores takes 3.44 s in place of 3.91 (docs/LOG.md; P = 512, K = 1 of benchmarks/peers.py). In the backward pass the base
layer receives A's gradient and accumulates its own into it, which also spares a tensor of the size of x. Cost: none; the
backward pass saves the same tensors.

The products run in the dtype of the layer's input. A float32 adapter on a bfloat16 model is cast for them, and its gradient
comes back in float32; PEFT would cast the input instead, and multiply in float32.

The adapter remains PEFT's: same modules, names and weights. ZeRO stage 3 gathers a weight when its module is called, so each
product stays in the module of its weight. There autograd adds the gradients of x as before: the base layer would return a
second tensor, for which DeepSpeed runs its hooks once more, and stage 3 already waits for its hooks.
"""

from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class _In(nn.Linear):
    """The matrix A of an adapter. It is still a module, because ZeRO-3 gathers a weight when its module is called."""

    def forward(self, input: Tensor) -> Tensor:
        """A input, in the dtype of input (..., I)."""
        return F.linear(input, self.weight.to(input.dtype))


class _Onto(nn.Linear):
    """The matrix B of an adapter."""

    def forward(self, input: Tensor, onto: Tensor | None = None, scale: float = 1.0) -> Tensor:
        """B input, or onto + scale B input, in the dtype of input (..., r); onto (..., O)."""
        weight = self.weight.to(input.dtype)
        if onto is None:
            return F.linear(input, weight)
        whole = torch.addmm(onto.flatten(0, -2), input.flatten(0, -2), weight.t(), alpha=scale)
        return whole.view(onto.shape)


class _Base(nn.Linear):
    """The frozen matrix W."""

    @property
    def joins(self) -> bool:
        """Whether a call may also pass its input on."""
        return not self.weight.requires_grad and not hasattr(self.weight, "ds_id")  # which ZeRO stage 3 gives to a parameter

    def forward(self, input: Tensor, pass_on: bool = False) -> Any:
        """W input (..., O) for input (..., I). pass_on: and the input, whose gradient W' dy accumulates into."""
        return _WithInput.apply(input, self.weight, self.bias) if pass_on else super().forward(input)  # type: ignore[no-untyped-call]


class _WithInput(torch.autograd.Function):
    """input -> (W input + bias, input). The second output must have one consumer, whose gradient no one else holds."""

    @staticmethod
    def forward(ctx: Any, input: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        ctx.save_for_backward(weight)
        return F.linear(input, weight, bias), input.view_as(input)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        """(dy (..., O), A' (s B' dy) (..., I)) -> dx (..., I), in the memory of the second."""
        (weight,) = ctx.saved_tensors
        outer, inner = gradients
        return inner.flatten(0, -2).addmm_(outer.flatten(0, -2), weight).view(inner.shape), None, None


@cache
def _accumulating() -> type[nn.Module]:
    """The class of a layer that runs this way; made on first use, because PEFT takes seconds to import."""
    from peft.tuners.lora import Linear

    class AccumulatingLinear(Linear):  # type: ignore[misc]
        """PEFT's layer, with a forward pass of its own for one adapter in the precision of its input."""

        def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            base, active = self.base_layer, [name for name in self.active_adapters if name in self.lora_B]
            plain = args or kwargs or self.disable_adapters or self.merged or len(active) != 1
            if plain or not self._accumulates(active[0], x.dtype):
                whole: Tensor = super().forward(x, *args, **kwargs)
                return whole
            (name,) = active
            if isinstance(base, _Base) and base.joins and x.requires_grad and torch.is_grad_enabled():
                result, x = base(x, pass_on=True)
            else:
                result = base(x)
            whole = self.lora_B[name](self.lora_A[name](self.lora_dropout[name](x)), result, self.scaling[name])
            return whole

        def _accumulates(self, name: str, dtype: torch.dtype) -> bool:
            return isinstance(self.lora_B[name], _Onto) and self.base_layer.weight.dtype == dtype

    return AccumulatingLinear


def fuse_lora(model: nn.Module) -> None:
    """Makes the plain LoRA adapters of all linear layers in the PEFT model `model` run this way.

    Results are equal to rounding.
    """
    from peft.tuners.lora import Linear

    modules: list[Any] = list(model.modules())
    for layer in modules:
        if type(layer) is not Linear:
            continue
        for name, last in layer.lora_B.items():
            first = layer.lora_A[name]
            plain = all(type(matrix) is nn.Linear and matrix.bias is None for matrix in (first, last))
            if name not in layer.lora_variant and plain:
                first.__class__, last.__class__ = _In, _Onto
        if any(isinstance(last, _Onto) for last in layer.lora_B.values()):
            layer.__class__ = _accumulating()
            if type(layer.base_layer) is nn.Linear:
                layer.base_layer.__class__ = _Base
