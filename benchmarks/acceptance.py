"""When a fused operation is accepted, and the plain float64 formulas that it is compared with.

The rule is that of ml-cross-entropy: |truth - fused| <= |truth - the plain reference in the same dtype| + tolerance, element by
element, for the output and for every gradient. Tests apply it in Triton's interpreter, benchmarks/gpu_kernels.py on a GPU.
"""

import math
from collections.abc import Callable, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional as F

# Relative to the largest element: one rounding of the dtype, since reference and fused round at different places.
TOLERANCE = {torch.float32: 2.0**-20, torch.float16: 2.0**-11, torch.bfloat16: 2.0**-8}
Op = Callable[..., Sequence[Tensor]]  # leaves -> outputs; leaves that require gradients get them


def rejection(truth: Tensor, plain: Tensor, fused: Tensor, dtype: torch.dtype) -> str | None:
    """Returns why `fused` is not accepted, or None. truth is float64; dtype selects the row of TOLERANCE."""
    if truth.numel() == 0:
        return None if fused.shape == truth.shape else f"shape {tuple(fused.shape)}"
    error, allowed = (truth - fused.double()).abs(), (truth - plain.double()).abs()
    # The negated form rejects a NaN.
    accepted = error <= allowed + TOLERANCE[dtype] * truth.abs().max()
    if bool(accepted.all()):
        return None
    worst = int((error - allowed).nan_to_num(nan=torch.inf).argmax())
    numbers = (values.flatten()[worst].item() for values in (truth, plain, fused))
    return "element {}: truth {:.9g}, plain {:.9g}, fused {:.9g}".format(worst, *numbers)


def results(op: Op, leaves: Sequence[Tensor]) -> list[Tensor]:
    """Returns the outputs of op and the gradient of their weighted sum for every leaf that requires one."""
    leaves = [leaf.detach().clone().requires_grad_(leaf.requires_grad) for leaf in leaves]
    outputs = op(*leaves)
    total = sum(
        (
            output * torch.linspace(0.5, 1.5, output.numel(), dtype=output.dtype, device=output.device).view_as(output)
        ).sum()  # weights that distinguish the outputs
        for output in outputs
        if output.requires_grad
    )
    assert isinstance(total, Tensor)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return [*(output.detach() for output in outputs), *torch.autograd.grad(total, wanted)]


def compare(truth: Op, plain: Op, fused: Op, leaves: Sequence[Tensor]) -> list[str]:
    """Lists why fused is rejected on `leaves`, which truth gets in float64. Empty if it is accepted."""
    exact = results(truth, [leaf.detach().double().requires_grad_(leaf.requires_grad) for leaf in leaves])
    triples = zip(exact, results(plain, leaves), results(fused, leaves), strict=True)
    found = [rejection(a.double(), b, c, leaves[0].dtype) for a, b, c in triples]
    return [f"result {place}: {reason}" for place, reason in enumerate(found) if reason]


def plain_logps(
    hidden: Tensor, weight: Tensor, bias: Tensor | None, rows: Tensor, targets: Tensor, offsets: Tensor, softcap: float | None
) -> Tensor:
    """(N,) log-probs from one log_softmax over all logits (M, V)."""
    logits = F.linear(hidden[rows], weight, bias)
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    token_logps = logits.log_softmax(dim=1).gather(1, targets[:, None])[:, 0]
    sums = [token_logps[start:end].sum() for start, end in pairwise(offsets.tolist())]
    return torch.stack(sums) if sums else token_logps[:0]


def plain_preference(
    policy: Tensor,
    reference: Tensor,
    offsets: Tensor,
    kind: str,
    beta: float,
    *,
    lengths: Tensor | None = None,
    margins: Tensor | None = None,
) -> Tensor:
    """(G,) losses by the papers' formulas, group by group."""
    losses = []
    for start, end in pairwise(offsets.tolist()):
        own = slice(start, end)
        if end - start < 2:
            losses.append(policy.sum() * 0)
            continue
        if kind == "mppo":
            assert lengths is not None
            r = beta * torch.exp(policy[own] / lengths[own])
        else:
            r = beta * (policy[own] - reference[own])
        ahead = r[0] - r[1:] - (0.0 if margins is None else margins[own][1:])  # (K,) of the positive before each negative
        if kind == "mppo":
            losses.append(-F.logsigmoid(ahead.sum()))
        elif kind == "dmpo":
            losses.append(-F.logsigmoid(ahead.mean()))
        elif kind == "dynamicpo":
            factors = plain_boundary(policy[own].tolist())
            losses.append(-F.logsigmoid(sum((factor * ahead[i] for i, factor in factors.items()), ahead.sum() * 0)))
        else:
            losses.append(-F.logsigmoid(-torch.logsumexp(-ahead, dim=0)))
    return torch.stack(losses) if losses else policy[:0]


def plain_boundary(logps: Sequence[float]) -> dict[int, float]:
    """DynamicPO's boundary negatives of one group, the positive's log-prob first: place among the negatives -> its share."""
    own, values = logps[0], list(logps[1:])
    chosen = [i for i, value in enumerate(values) if value >= own]
    if not chosen:
        centres = _centres(values)
        chosen = [i for i, value in enumerate(values) if _nearest(value, centres) == 2]
    easy = [value for i, value in enumerate(values) if i not in chosen] or [values[i] for i in chosen]
    shares = {}
    for i in chosen:
        above, below = own - values[i], values[i] - sum(easy) / len(easy)
        size = abs(above) + abs(below)
        turn = math.tanh((above - below - 2.0) / size) if size else -1.0
        shares[i] = (1 + 0.5 * turn) / len(chosen)
    return shares


def _centres(values: Sequence[float]) -> list[float]:
    """Three centres by Lloyd's algorithm, from the lowest, the one farthest from both ends, and the highest."""
    low, high = min(values), max(values)
    centres = [low, max((min(v - low, high - v), v) for v in values)[1], high]
    for _ in range(8):
        near = [[v for v in values if _nearest(v, centres) == k] for k in range(3)]
        centres = [sum(group) / len(group) if group else centre for group, centre in zip(near, centres, strict=True)]
    return centres


def _nearest(value: float, centres: Sequence[float]) -> int:
    """Of centres in ascending order; the higher of two that are equally near."""
    return max(range(3), key=lambda k: (-abs(value - centres[k]), k))
