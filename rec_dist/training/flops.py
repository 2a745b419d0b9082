"""Floating-point operations of a training step, and what the device could do at best. Pure functions of numbers; formulas in words.

A matrix of n weights costs a token 2n operations in the forward pass, 2n for the gradient of its input, and 2n for its own gradient
where it trains: 4n frozen, 6n training. So LoRA on a model of N weights is 4N (and 6 for each of the adapter's), full
fine-tuning 6N. Left out: attention's scores (1-2 % at prompts up to 1000 tokens), norms, the optimizer, an online reference.
"""

FORMULA = (
    "tokens * (4 * frozen + 6 * training weights) + scored rows * (4 or 6) * head weights; matrices without embeddings; "
    "attention scores not counted; hfu adds what is computed twice: 2 * all weights a token with activation checkpointing, "
    "2 * head weights a scored row"
)

# Dense bfloat16 tensor-core peak of one GPU in FLOP/s, by a part of torch's device name; the first that fits counts.
# Source: NVIDIA's data sheets of each product (their figures with sparsity, halved).
_SOURCE = "NVIDIA data sheet, dense bfloat16"
_BF16_PEAKS = (
    ("GB200", 2.5e15),
    ("B200", 2.25e15),
    ("H200 NVL", 835e12),
    ("H200", 989e12),
    ("H100 PCIe", 756e12),
    ("H100 NVL", 835e12),
    ("H100", 989e12),
    ("A100", 312e12),
)


def token_flops(*, frozen: int, training: int) -> int:
    """Of one token through matrices of `frozen` and `training` weights, forward and backward."""
    return 4 * frozen + 6 * training


def row_flops(*, head: int, trains: bool) -> int:
    """Of one scored row through the head of `head` = V * D weights, forward and backward."""
    return (6 if trains else 4) * head


def step_flops(tokens: int, rows: int, *, frozen: int, training: int, head: int, head_trains: bool) -> int:
    """Of `tokens` processed tokens and `rows` distinct scored rows: each operation once."""
    return tokens * token_flops(frozen=frozen, training=training) + rows * row_flops(head=head, trains=head_trains)


def recomputed_flops(tokens: int, rows: int, *, frozen: int, training: int, head: int, checkpointing: bool) -> int:
    """Done a second time in the backward pass: the layers with activation checkpointing, and always the head's logits."""
    return (2 * tokens * (frozen + training) if checkpointing else 0) + 2 * rows * head


def known_peak(device_name: str) -> tuple[float, str] | None:
    """(FLOP/s in bfloat16, source) of a GPU by its name, or None.

    >>> known_peak("NVIDIA H100 80GB HBM3")
    (989000000000000.0, 'NVIDIA data sheet, dense bfloat16')
    """
    for name, peak in _BF16_PEAKS:
        if name.lower() in device_name.lower():
            return peak, _SOURCE
    return None


def utilisation(flops: float, seconds: float, peak: float, world_size: int) -> float:
    """The share of what `world_size` devices of `peak` FLOP/s could have done in `seconds`."""
    return flops / (seconds * peak * world_size)
