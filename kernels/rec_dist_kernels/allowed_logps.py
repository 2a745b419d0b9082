"""Log-probabilities of completions where each token competes with a few words only, as the titles of a catalogue allow.

Why: a softmax over the words that some title goes on with needs the logits of those words alone. A row is multiplied with the
gathered head rows of the words that its chunk allows, and not with the whole vocabulary; a token that is the only allowed one has
probability 1, and is not in the plan at all.
Cost: 2 * C * U * D a product for C choices and U words of a chunk, one product forward and two (three, if the head trains) back,
where every chunk is made again; memory of the gathered head rows (U, D) and a few times (C, U). There is no (M, V), nor (C, V).

T rows of the batch, D width, V vocabulary, N completions, R choices (a row of hidden, and what its token competes with), S tokens
that have a choice, Q nodes (sets of allowed words) of a chunk, C choices and U words of a chunk.
"""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional as F


class AllowedChunk(NamedTuple):
    """Where a chunk lies in the arrays of AllowedPlan, and how many nodes it has."""

    choices: slice
    tokens: slice
    words: slice
    pairs: slice
    num_nodes: int


class AllowedPlan(NamedTuple):
    """What each token competes with. Made with the batch on the host, since it depends on titles and not on the head.

    C * U logits of a chunk are in memory together. temperature: divides the logits, after softcap.
    """

    rows: Tensor  # (R,) int64: the row of hidden of each choice
    nodes: Tensor  # (R,) int64: its node, counted within the chunk
    choices: Tensor  # (S,) int64: the choice of each token, counted within the chunk
    targets: Tensor  # (S,) int64: the token itself, as a place among the words of the chunk
    completions: Tensor  # (S,) int64: which completion it belongs to
    order: Tensor  # (S,) int64: the tokens by their completions
    offsets: Tensor  # (N+1,) int64 into order
    words: Tensor  # (sum of U,) int64: the words that a chunk allows, each once
    pairs: Tensor  # int64: node * U + place of a word, for each word that a node of a chunk allows
    chunks: tuple[AllowedChunk, ...]
    temperature: float


def allowed_logps(
    hidden: Tensor, weight: Tensor, plan: AllowedPlan, *, bias: Tensor | None = None, softcap: float | None = None
) -> Tensor:
    """The log-probability of each completion within what is allowed, summed over its tokens, in nats.

        z_m    = cap(weight @ hidden[row_m] + bias) / temperature
        logp_n = sum over the tokens m of completion n of  z_m[target_m] - logsumexp over the allowed words of z_m
        cap(x) = softcap * tanh(x / softcap)

    MSL, arXiv 2504.04178. Products run in the dtype of `hidden`, on CPUs in float32 or float64; the softmax and all sums in
    float32 (float64 for float64). Autocast is ignored. Plain PyTorch on every device: U is some thousands where V is 10^5, so
    that the passes over (C, U) which a kernel would join cost less than the vocabulary's logits did
    (docs/adr/0019-allowed-words.md).

    Args: hidden (T, D); weight (V, D), whose gradient is skipped when it is frozen; plan on the device of hidden; bias (V,).

    Returns: (N,) float32 (float64 for float64), 0 for a completion without a choice. With S = 0 it still carries a (zero)
    gradient to its inputs.

    Errors: ValueError for wrong shapes or dtypes; the values of the plan are checked on the CPU only.
    """
    _check(hidden, weight, plan, bias, softcap)
    logps: Tensor = _AllowedLogps.apply(hidden, weight, bias, plan, softcap)  # type: ignore[no-untyped-call]
    return logps


class _AllowedLogps(torch.autograd.Function):
    """logp_m = z_m[t_m] - logsumexp over A_m of z_m, for each token m that has a choice, the words A_m; summed by completion.

    With g_m the gradient of its completion: dx_m = g_m (onehot(t_m) - softmax over A_m of z_m) (1 - (temperature z_m / softcap)^2)
    / temperature, summed over the tokens of a choice;  dh = dx W_A,  dW_A = dx^T h,  db_A = sum dx.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, plan: AllowedPlan, softcap: float | None
    ) -> Tensor:
        dtype = _accumulate_dtype(hidden)
        logps = torch.empty(plan.targets.shape[0], dtype=dtype, device=hidden.device)  # (S,)
        normaliser = torch.empty(plan.rows.shape[0], dtype=dtype, device=hidden.device)  # (R,)
        for chunk in plan.chunks:
            words = plan.words[chunk.words]
            own = None if bias is None else bias[words]
            inputs, gathered = _factor(hidden[plan.rows[chunk.choices]]), _factor(weight[words])
            logits = _choices(inputs, gathered, own, softcap, plan.temperature)  # (C, U)
            lse = logits.masked_fill_(_forbidden(plan, chunk), -torch.inf).logsumexp(dim=1)  # (C,)
            choices = plan.choices[chunk.tokens]
            logps[chunk.tokens] = logits[choices, plan.targets[chunk.tokens]] - lse[choices]
            normaliser[chunk.choices] = lse
        ctx.save_for_backward(hidden, weight, bias, normaliser)
        ctx.plan, ctx.softcap = plan, softcap
        # In the order of completions, for the same sum every time: index_add_ on a GPU adds in any order.
        return torch.segment_reduce(logps[plan.order], "sum", offsets=plan.offsets, unsafe=True)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_logps: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, normaliser = ctx.saved_tensors
        plan: AllowedPlan = ctx.plan
        needs_hidden, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        grad_hidden = torch.zeros_like(hidden) if needs_hidden else None
        # Sums over chunks in float32: in bfloat16 the late chunks would be rounded away.
        grad_weight = torch.zeros_like(weight, dtype=normaliser.dtype) if needs_weight else None
        grad_bias = torch.zeros_like(bias, dtype=normaliser.dtype) if needs_bias else None
        grad = grad_logps[plan.completions].to(normaliser.dtype)  # (S,)
        for chunk in plan.chunks:
            rows, words = plan.rows[chunk.choices], plan.words[chunk.words]
            inputs, gathered = _factor(hidden[rows]), _factor(weight[words])
            logits = _choices(inputs, gathered, None if bias is None else bias[words], ctx.softcap, plan.temperature)
            delta = _logits_gradient(logits, plan, chunk, normaliser[chunk.choices], grad[chunk.tokens], ctx.softcap)  # (C, U)
            if grad_bias is not None:
                grad_bias.index_add_(0, words, delta.sum(dim=0))
            delta = delta.to(inputs.dtype)
            with torch.autocast(hidden.device.type, enabled=False):
                if grad_hidden is not None:
                    grad_hidden.index_add_(0, rows, (delta @ gathered).to(grad_hidden.dtype))
                if grad_weight is not None:  # the words of a chunk are distinct: each is added to once
                    grad_weight.index_add_(0, words, (delta.T @ inputs).to(grad_weight.dtype))
        return (
            grad_hidden,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
            None,
        )


def _factor(rows: Tensor) -> Tensor:
    """What is multiplied: on a CPU never bfloat16, since oneDNN keeps a compiled product for each shape, and C and U vary."""
    return rows.float() if rows.device.type == "cpu" and rows.dtype in (torch.bfloat16, torch.float16) else rows


def _choices(inputs: Tensor, words: Tensor, bias: Tensor | None, softcap: float | None, temperature: float) -> Tensor:
    """z of a chunk: inputs (C, D), head rows (U, D), bias (U,) -> (C, U) in the accumulation dtype."""
    # Forward and backward may run under different autocast settings, and have to make the same logits.
    with torch.autocast(inputs.device.type, enabled=False):
        logits = F.linear(inputs, words).to(_accumulate_dtype(inputs))
    if bias is not None:
        logits += bias
    if softcap is not None:
        logits.div_(softcap).tanh_().mul_(softcap)
    return logits.div_(temperature)


def _forbidden(plan: AllowedPlan, chunk: AllowedChunk) -> Tensor:
    """(C, U): the words that a choice does not have."""
    size = chunk.words.stop - chunk.words.start
    table = torch.ones(chunk.num_nodes * size, dtype=torch.bool, device=plan.rows.device)
    table.index_fill_(0, plan.pairs[chunk.pairs], False)
    return table.view(chunk.num_nodes, size)[plan.nodes[chunk.choices]]


def _logits_gradient(
    logits: Tensor, plan: AllowedPlan, chunk: AllowedChunk, normaliser: Tensor, grad: Tensor, softcap: float | None
) -> Tensor:
    """dx of a chunk: logits z (C, U), overwritten, normaliser (C,), grad of the chunk's tokens -> (C, U)."""
    slope = None if softcap is None else 1 - (logits * (plan.temperature / softcap)).square_()
    choices = plan.choices[chunk.tokens]
    total = torch.zeros_like(normaliser).index_add_(0, choices, grad)  # (C,)
    logits.masked_fill_(_forbidden(plan, chunk), -torch.inf)
    delta = logits.sub_(normaliser[:, None]).exp_().mul_(-total[:, None])
    delta.index_put_((choices, plan.targets[chunk.tokens]), grad, accumulate=True)  # completions may begin with the same token
    delta.div_(plan.temperature)
    return delta if slope is None else delta.mul_(slope)


def _accumulate_dtype(hidden: Tensor) -> torch.dtype:
    return torch.float64 if hidden.dtype == torch.float64 else torch.float32


def _check(hidden: Tensor, weight: Tensor, plan: AllowedPlan, bias: Tensor | None, softcap: float | None) -> None:
    if hidden.dim() != 2 or weight.dim() != 2 or hidden.shape[1] != weight.shape[1]:
        raise ValueError(f"hidden (T, D) and weight (V, D) must share D, got {tuple(hidden.shape)} and {tuple(weight.shape)}")
    if hidden.dtype != weight.dtype or not hidden.is_floating_point():
        raise ValueError(f"hidden and weight must have one floating dtype, got {hidden.dtype} and {weight.dtype}")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias must have shape (V,) = ({weight.shape[0]},), got {tuple(bias.shape)}")
    if softcap is not None and not 0 < softcap < float("inf"):
        raise ValueError(f"softcap must be positive and finite, or None, got {softcap}")
    if not 0 < plan.temperature < float("inf"):
        raise ValueError(f"temperature must be positive and finite, got {plan.temperature}")
    if plan.rows.device.type != "cpu":
        return
    for name, index, size in (("rows", plan.rows, hidden.shape[0]), ("words", plan.words, weight.shape[0])):
        if index.numel() and not 0 <= int(index.min()) <= int(index.max()) < size:
            raise ValueError(f"{name} of the plan must lie in 0..{size - 1}, got {int(index.min())}..{int(index.max())}")
