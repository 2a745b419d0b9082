"""Whether the Triton kernels are accepted on this GPU: the rule of benchmarks/acceptance.py, forward and backward.

The interpreter, in which tests/triton applies the same rule, neither compiles nor rounds as a GPU does. Shapes are those of real
use: one word count of Llama 3, several chunks of logits, rows that completions share, groups of 0, 1, 3 and 15 negatives.

T batch rows, D width, V vocabulary, M scored tokens, N completions, G groups.
"""

import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.acceptance import compare, plain_logps, plain_preference, results
from benchmarks.gpu_rows import NotMeasuredError, Place, Row, Suite
from benchmarks.peer_methods import make_case, prompt_of
from benchmarks.peer_targets import Point
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist_kernels import PreferenceKind, completion_logps, preference_head, preference_loss

BETA = 0.2
KINDS: tuple[PreferenceKind, ...] = ("sdpo", "dmpo", "mppo")  # dynamicpo: rounding may move its boundary
_POINTS = (Point(9, 8, 3, 24), Point(9, 8, 1, 24), Point(9, 8, 15, 8), Point(9, 8, 0, 4))
_TINY_POINTS = (Point(5, 3, 3, 2), Point(5, 3, 1, 1), Point(5, 3, 0, 1))

Op = Callable[..., Sequence[Tensor]]


class Inputs:
    """A batch, and the hidden rows (T, D) and head (V, D) that both train."""

    def __init__(self, place: Place, dtype: torch.dtype) -> None:
        self.vocab, self.width = (130, 8) if place.tiny else (128256, 1024)
        self.batch = _batch(_TINY_POINTS if place.tiny else _POINTS, self.vocab).to(place.device)
        torch.manual_seed(0)
        draw = lambda *size: torch.randn(*size, device=place.device)
        # A random model's: a completion of C tokens has about -C log V nats, of which a deviation of 4 is left after training.
        mean = -float(self.batch.completion_offsets.diff()[0]) * math.log(self.vocab)
        self.batch = self.batch.with_reference(mean + 4 * draw(len(self.batch.reference_logps)))
        self.policy = (mean + 4 * draw(len(self.batch.reference_logps))).to(dtype).requires_grad_()  # (N,)
        self.hidden = draw(self.batch.num_tokens, self.width).to(dtype).requires_grad_()
        self.weight = (draw(self.vocab, self.width) * self.width**-0.5).to(dtype).requires_grad_()

    @property
    def scored(self) -> tuple[Tensor, Tensor, Tensor]:
        return self.batch.rows, self.batch.targets, self.batch.completion_offsets


def _batch(points: Sequence[Point], vocab: int) -> PackedBatch:
    prompts = []
    for point in points:
        case = make_case(point, vocab)
        pairs = zip(case.prompts, case.completions, strict=True)
        prompts += [prompt_of(prompt, [len(prompt) - 1], [answers], key) for key, (prompt, answers) in enumerate(pairs)]
    return pack_prompts(prompts)


def logps_ops(inputs: Inputs, fused: Any) -> tuple[Op, Op, Op]:
    """completion_logps as truth, plain and fused: hidden, weight -> log-probs (N,)."""
    run = lambda impl: lambda hidden, weight: [completion_logps(hidden, weight, *inputs.scored, impl=impl)]
    truth = lambda hidden, weight: [plain_logps(hidden, weight, None, *inputs.scored, None)]
    return truth, run("reference"), run(fused)


def head_ops(inputs: Inputs, kind: PreferenceKind, fused: Any) -> tuple[Op, Op, Op]:
    """preference_head as truth, plain and fused: hidden, weight -> loss (), log-probs (N,)."""
    reference, groups = inputs.batch.reference_logps, inputs.batch.group_offsets

    def truth(hidden: Tensor, weight: Tensor) -> list[Tensor]:
        logps = plain_logps(hidden, weight, None, *inputs.scored, None)
        lengths = inputs.batch.completion_offsets.diff()
        return [plain_preference(logps, reference.double(), groups, kind, BETA, lengths=lengths).sum(), logps.detach()]

    def run(impl: Any) -> Op:
        arrays = (*inputs.scored, reference, groups)
        return lambda hidden, weight: preference_head(hidden, weight, *arrays, kind=kind, beta=BETA, impl=impl)

    return truth, run("reference"), run(fused)


def loss_ops(inputs: Inputs, kind: PreferenceKind, fused: Any) -> tuple[Op, Op, Op]:
    """preference_loss as truth, plain and fused: policy log-probs (N,) -> losses (G,), rewards (N,)."""
    reference, groups = inputs.batch.reference_logps, inputs.batch.group_offsets
    lengths = inputs.batch.completion_offsets.diff()

    def truth(policy: Tensor) -> list[Tensor]:
        rewards = BETA * (torch.exp(policy / lengths) if kind == "mppo" else policy - reference.double()).detach()
        return [plain_preference(policy, reference.double(), groups, kind, BETA, lengths=lengths), rewards]

    run = lambda impl: lambda p: preference_loss(p, reference, groups, kind=kind, beta=BETA, lengths=lengths, impl=impl)
    return truth, run("reference"), run(fused)


def judge(ops: tuple[Op, Op, Op], leaves: Sequence[Tensor]) -> Row:
    """How many results (outputs and gradients) there are, how many are rejected, and why."""
    reasons = compare(*ops, leaves)
    return {"results": len(results(ops[1], leaves)), "rejected": len(reasons), "why": "; ".join(reasons)[:300]}


def check_runnable(place: Place) -> None:
    """Raises NotMeasuredError where Triton cannot run: on a CPU, unless it interprets."""
    if not place.on_gpu and os.environ.get("TRITON_INTERPRET") != "1":
        raise NotMeasuredError("Triton needs a GPU, or TRITON_INTERPRET=1")


def run(suite: Suite) -> None:
    """A row for each operation, kind of loss and dtype."""
    # Triton's interpreter truncates to bfloat16, so tiny shapes are compared in float32 alone.
    for dtype in (torch.float32,) if suite.place.tiny else (torch.bfloat16, torch.float32):
        inputs = suite.build({"op": "all", "dtype": _name(dtype)}, 5.0, lambda dtype=dtype: _inputs(suite, dtype))  # type: ignore[misc]
        if inputs is None:
            continue
        about = {"dtype": _name(dtype), "V": inputs.vocab, "D": inputs.width, "M": len(inputs.batch.targets)}
        matrices, policy = (inputs.hidden, inputs.weight), (inputs.policy,)
        suite.row({"op": "completion_logps", "kind": "", **about}, 8.0, _judging(logps_ops(inputs, "triton"), matrices))
        for kind in KINDS:
            suite.row({"op": "preference_head", "kind": kind, **about}, 8.0, _judging(head_ops(inputs, kind, "triton"), matrices))
            suite.row({"op": "preference_loss", "kind": kind, **about}, 4.0, _judging(loss_ops(inputs, kind, "triton"), policy))


def _inputs(suite: Suite, dtype: torch.dtype) -> Inputs:
    check_runnable(suite.place)
    return Inputs(suite.place, dtype)


def _judging(ops: tuple[Op, Op, Op], leaves: Sequence[Tensor]) -> Callable[[], Row]:
    return lambda: judge(ops, leaves)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
