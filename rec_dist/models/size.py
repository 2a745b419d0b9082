"""How many weights a token passes in a scorer, from which the floating-point operations of a step are counted.

Only matrices count: the work of norms and biases is 1e-4 of theirs. The counts are exact even if ZeRO-3 has sharded the weights.
"""

from dataclasses import dataclass
from math import prod

from torch import nn

from rec_dist.models.scorer import REFERENCE_ADAPTER, Scorer
from rec_dist.models.soft_prompt import SoftPromptEmbedding


@dataclass(frozen=True)
class WeightCount:
    """Elements of the matrices that every token passes, frozen and training, and of the head (V * D), which only scored rows
    pass."""

    frozen: int
    training: int
    head: int
    head_trains: bool


def count_weights(module: nn.Module) -> WeightCount | None:
    """The count for a scorer. None for any other module, and if tokens pass different weights (experts)."""
    if not isinstance(module, Scorer):
        return None
    head = module.head
    embeddings = {id(layer.weight) for layer in module.modules() if isinstance(layer, nn.Embedding)}
    embeddings |= {id(layer.prompt) for layer in module.modules() if isinstance(layer, SoftPromptEmbedding)}
    frozen = training = 0
    for name, parameter in module.named_parameters():
        shape = getattr(parameter, "ds_shape", parameter.shape)
        if len(shape) > 2 or ".experts." in name:
            return None
        if len(shape) < 2 or id(parameter) in embeddings or parameter is head.weight or f".{REFERENCE_ADAPTER}." in name:
            continue
        if parameter.requires_grad:
            training += prod(shape)
        else:
            frozen += prod(shape)
    size = prod(getattr(head.weight, "ds_shape", head.weight.shape))
    return WeightCount(frozen, training, size, bool(head.weight.requires_grad))
