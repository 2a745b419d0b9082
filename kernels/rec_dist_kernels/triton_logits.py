"""Triton kernels between the two GEMMs of the head: logits in, log-probs out; and in place, logits in, gradient out.

Why: in PyTorch each pass over a chunk of logits becomes four to eight passes in float32. Here a logit is read once in the
forward pass, and read and written once in the backward pass, in the dtype of the GEMM, with float32 arithmetic.
Cost: 2 bytes a bfloat16 logit in the forward kernel, 4 in the gradient kernel; 1.125 exponentials and one.

Rows of logits are `stride` apart, at least V and a multiple of 64 (LogitsBuffer): blocks are masked by it, as a mask that
may end at any word makes every load one word wide. Offsets are int64: C * V may pass 2^31.
C rows of a chunk, V vocabulary, M scored tokens, N completions.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

# 16 elements a thread: at the width of a bfloat16 load, two of them. Fixed, as autotuning would make the sums depend on the
# machine's mood; more elements spill (see tests/triton/test_ahead_of_time.py).
LSE_BLOCK, LSE_WARPS = 4096, 8
GRADIENT_BLOCK, GRADIENT_WARPS = 2048, 4
BIAS_BLOCK, BIAS_WARPS = 128, 1  # 1,000 programs at V = 128,000; more warps spill on chip 100
TOKENS_BLOCK = 32  # of the tokens that one row predicts: K+1 at a branch point, 1 elsewhere
COMPLETION_BLOCK = 32  # tokens of a title
SCALE_BLOCK = 2048
LOG2_E = tl.constexpr(1.4426950408889634)
LOWEST = tl.constexpr(-1e38)  # below any logit; not -inf: where all words so far are forbidden, -inf - -inf is NaN
_UNALIGNED = ("starts_ptr", "lse_ptr", "offsets_ptr", "sums_ptr")  # views into longer arrays; read one number at a time


@triton.jit
def _capped(logits, softcap, HAS_CAP: tl.constexpr):
    """softcap * tanh(logits / softcap), and tanh itself, whose square the gradient needs."""
    tanh = logits
    if HAS_CAP:
        x = logits / softcap
        square = x * x
        # 1 - exp cancels where x is small, so there the series: wrong by 1e-8 of the value at |x| = 0.25.
        series = x * (1 + square * (-1 / 3 + square * (2 / 15 + square * (-17 / 315 + square * (62 / 2835)))))
        decay = tl.exp(-2 * tl.abs(x))
        far = tl.where(x < 0, -1.0, 1.0) * (1 - decay) / (1 + decay)
        tanh = tl.where(tl.abs(x) < 0.25, series, far)
        logits = softcap * tanh
    return logits, tanh


@triton.jit
def _load_logits(line_ptr, bias_ptr, columns, stored, real, softcap, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """z = cap(x + b) in float32 at `columns`, and its tanh: loaded where stored, 0 where not real."""
    # The cast comes first: the interpreter computes bfloat16 as if its bits were integers.
    logits = tl.load(line_ptr + columns, mask=stored, other=0.0).to(tl.float32)
    logits = tl.where(real, logits, 0.0)
    if HAS_BIAS:
        logits += tl.load(bias_ptr + columns, mask=real, other=0.0).to(tl.float32)
    return _capped(logits, softcap, HAS_CAP)


@triton.jit
def _online_sum(highest, total, logits):
    """A step of online softmax, arXiv 1805.02867, for each row of logits (R, L): maximum and sum exp(x - maximum) so far, (R,)."""
    # exp2 and not exp: Triton spends three more instructions on an exp so that it is right below 2^-126; the largest term is 1.
    raised = tl.maximum(highest, tl.max(logits, axis=1))
    total *= tl.exp2((highest - raised) * LOG2_E)
    return raised, total + tl.sum(tl.exp2((logits - raised[:, None]) * LOG2_E), axis=1)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def token_logps_kernel(
    logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, lse_ptr, logps_ptr, vocabulary, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr, LANES: tl.constexpr, TOKENS: tl.constexpr,
):  # fmt: skip
    """lse_c = log sum_v exp(z_cv) in one pass over V; then logp_m = z_c[t_m] - lse_c for the tokens m of row c.

    One program a row. The LANES logits that a thread loads at once share a running maximum and sum in that thread, so that the
    loop has neither barriers nor shuffles and 1 + 1 / LANES exponentials a logit; the threads meet once, after it.
    """
    row = tl.program_id(0)
    line_ptr = logits_ptr + row * stride.to(tl.int64)
    within = tl.arange(0, BLOCK // LANES)[:, None] * LANES + tl.arange(0, LANES)[None, :]
    highest = tl.full([BLOCK // LANES], LOWEST, dtype=tl.float32)
    total = tl.zeros([BLOCK // LANES], dtype=tl.float32)
    whole = vocabulary // BLOCK * BLOCK
    every = tl.full([BLOCK // LANES, LANES], True, dtype=tl.int1)  # a constant mask, which the compiler removes
    for first in range(0, whole, BLOCK):
        logits, _ = _load_logits(line_ptr, bias_ptr, first + within, every, every, softcap, HAS_BIAS, HAS_CAP)
        highest, total = _online_sum(highest, total, logits)
    if whole < vocabulary:
        columns = whole + within
        real = columns < vocabulary
        logits, _ = _load_logits(line_ptr, bias_ptr, columns, columns < stride, real, softcap, HAS_BIAS, HAS_CAP)
        highest, total = _online_sum(highest, total, tl.where(real, logits, float("-inf")))
    top = tl.max(highest, axis=0)
    lse = top + tl.log(tl.sum(total * tl.exp(highest - top), axis=0))
    tl.store(lse_ptr + row, lse)

    start = tl.load(starts_ptr + row)
    end = tl.load(starts_ptr + row + 1)
    for first in range(start, end, TOKENS):
        index = first + tl.arange(0, TOKENS)
        real = index < end
        token = tl.load(order_ptr + index, mask=real, other=0)
        target = tl.load(targets_ptr + token, mask=real, other=0)
        chosen, _ = _load_logits(line_ptr, bias_ptr, target, real, real, softcap, HAS_BIAS, HAS_CAP)
        tl.store(logps_ptr + token, chosen - lse, mask=real)


@triton.jit
def _row_gradient(
    row, block, logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, owners_ptr, grads_ptr, lse_ptr, vocabulary, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """dx_cv = (1 - (z_cv / softcap)^2) * sum over the tokens m of row c of  g_m ([v = t_m] - exp(z_cv - lse_c)), float32 (BLOCK,).

    g_m is the gradient of the completion that owns m. Each block walks the row's tokens, whose targets mostly lie
    elsewhere: a few loads and a comparison a token. 0 outside the vocabulary.
    """
    columns = block * BLOCK + tl.arange(0, BLOCK)
    real = columns < vocabulary
    line_ptr = logits_ptr + row * stride.to(tl.int64)
    logits, tanh = _load_logits(line_ptr, bias_ptr, columns, columns < stride, real, softcap, HAS_BIAS, HAS_CAP)

    row_grad = 0.0
    hits = tl.zeros([BLOCK], dtype=tl.float32)
    for index in range(tl.load(starts_ptr + row), tl.load(starts_ptr + row + 1)):
        token = tl.load(order_ptr + index)
        grad = tl.load(grads_ptr + tl.load(owners_ptr + token)).to(tl.float32)
        target = tl.load(targets_ptr + token)
        row_grad += grad
        if (target >= block * BLOCK) & (target < block * BLOCK + BLOCK):
            hits += tl.where(columns == target, grad, 0.0)  # a row may have one target twice

    delta = hits - row_grad * tl.exp(tl.where(real, logits - tl.load(lse_ptr + row), float("-inf")))
    if HAS_CAP:
        delta *= 1 - tanh * tanh
    return delta


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def logits_gradient_kernel(
    logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, owners_ptr, grads_ptr, lse_ptr, vocabulary, softcap,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """_row_gradient over the logits it is made from; one program a row and BLOCK words."""
    row, block = tl.program_id(0), tl.program_id(1)
    delta = _row_gradient(
        row, block, logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, owners_ptr, grads_ptr, lse_ptr, vocabulary,
        softcap, HAS_BIAS, HAS_CAP, BLOCK,
    )  # fmt: skip
    columns = block * BLOCK + tl.arange(0, BLOCK)
    line_ptr = logits_ptr + row * stride.to(tl.int64)
    tl.store(line_ptr + columns, delta.to(logits_ptr.dtype.element_ty), mask=columns < stride)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def bias_gradient_kernel(
    logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, owners_ptr, grads_ptr, lse_ptr, vocabulary, softcap,
    rows, sums_ptr, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """sums_v += sum_c dx_cv, from the logits: summed from their gradient, which is stored in bfloat16, it would be rounded twice.

    One program a BLOCK of words walks all rows: no atomics, so the same sum every time.
    """
    block = tl.program_id(0)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for row in range(rows):
        total += _row_gradient(
            row, block, logits_ptr, stride, bias_ptr, order_ptr, starts_ptr, targets_ptr, owners_ptr, grads_ptr, lse_ptr, vocabulary,
            softcap, HAS_BIAS, HAS_CAP, BLOCK,
        )  # fmt: skip
    columns = block * BLOCK + tl.arange(0, BLOCK)
    total += tl.load(sums_ptr + columns, mask=columns < vocabulary, other=0.0)
    tl.store(sums_ptr + columns, total, mask=columns < vocabulary)


@triton.jit(do_not_specialize_on_alignment=_UNALIGNED)
def completion_sums_kernel(logps_ptr, offsets_ptr, sums_ptr, BLOCK: tl.constexpr):
    """logp_n = sum of the token log-probs of completion n, one program each: the same sum every time, unlike atomics."""
    completion = tl.program_id(0)
    start = tl.load(offsets_ptr + completion).to(tl.int64)
    end = tl.load(offsets_ptr + completion + 1).to(tl.int64)
    total = tl.zeros([BLOCK], dtype=tl.float32)
    for first in range(start, end, BLOCK):
        index = first + tl.arange(0, BLOCK)
        total += tl.load(logps_ptr + index, mask=index < end, other=0.0)
    tl.store(sums_ptr + completion, tl.sum(total, axis=0))


@triton.jit
def scale_kernel(values_ptr, factor_ptr, scaled_ptr, size, BLOCK: tl.constexpr):
    """scaled = values * factor, the product rounded once: PyTorch would round a () factor to bfloat16 before."""
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    values = tl.load(values_ptr + index, mask=index < size, other=0.0).to(tl.float32)
    scaled = values * tl.load(factor_ptr).to(tl.float32)
    tl.store(scaled_ptr + index, scaled.to(scaled_ptr.dtype.element_ty), mask=index < size)


def token_logps(
    logits: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    order: Tensor,
    starts: Tensor,
    targets: Tensor,
    lse: Tensor,
    logps: Tensor,
) -> None:
    """Fills lse (C,) and those of logps (M,) that the rows of logits (C, V) predict: order[starts[c] : starts[c+1]], starts (C+1,)."""
    token_logps_kernel[(logits.shape[0],)](
        logits, logits.stride(0), bias, order, starts, targets, lse, logps, logits.shape[1], softcap or 1.0,
        HAS_BIAS=bias is not None, HAS_CAP=softcap is not None, BLOCK=LSE_BLOCK, LANES=16 // logits.element_size(),
        TOKENS=TOKENS_BLOCK, num_warps=LSE_WARPS,
    )  # fmt: skip


def logits_gradient(
    logits: Tensor,
    bias: Tensor | None,
    softcap: float | None,
    order: Tensor,
    starts: Tensor,
    targets: Tensor,
    owners: Tensor,
    grads: Tensor,
    lse: Tensor,
    bias_sums: Tensor | None,
) -> None:
    """Overwrites logits (C, V) with their gradient; adds its sum over rows to bias_sums (V,) float32, where that is wanted.

    As token_logps; owners (M,) the completion of each token, grads (N,) float32, lse (C,).
    """
    numbers = (logits, logits.stride(0), bias, order, starts, targets, owners, grads, lse, logits.shape[1], softcap or 1.0)
    flags = {"HAS_BIAS": bias is not None, "HAS_CAP": softcap is not None}
    if bias_sums is not None:
        blocks = triton.cdiv(logits.shape[1], BIAS_BLOCK)
        bias_gradient_kernel[(blocks,)](*numbers, logits.shape[0], bias_sums, **flags, BLOCK=BIAS_BLOCK, num_warps=BIAS_WARPS)
    grid = (logits.shape[0], triton.cdiv(logits.shape[1], GRADIENT_BLOCK))  # 128 blocks at V = 262,144; axis 1 takes 65,535
    logits_gradient_kernel[grid](*numbers, **flags, BLOCK=GRADIENT_BLOCK, num_warps=GRADIENT_WARPS)


def completion_sums(logps: Tensor, offsets: Tensor, sums: Tensor) -> None:
    """Fills sums (n,) float32 with those of logps (M,) between offsets (n+1,)."""
    completion_sums_kernel[(sums.shape[0],)](logps, offsets, sums, BLOCK=COMPLETION_BLOCK, num_warps=1)


def scale(values: Tensor, factor: Tensor) -> Tensor:
    """values of any shape times factor (), as a new tensor of the dtype of values."""
    values = values.contiguous()
    scaled = torch.empty_like(values)
    grid = (triton.cdiv(values.numel(), SCALE_BLOCK),)
    scale_kernel[grid](values, factor, scaled, values.numel(), BLOCK=SCALE_BLOCK, num_warps=4)
    return scaled
