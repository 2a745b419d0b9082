"""Compares the attention that model.attention=auto chooses on a device with the dense mask.

It compares log-probs and gradients, and counts compilations. FlexAttention has no backward pass on CPUs, so only a GPU can
compare its gradients; a CPU compares the path that runs prompt by prompt. Everything is in float32, so that the masks are
compared and not the rounding; a GPU may still use TF32 for its products.
"""

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_rows import Place, Row, Suite
from benchmarks.peer_methods import TINY, Grouped, Shape, build_model, make_case, prompt_of
from benchmarks.peer_targets import Point
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.flex import allow_compilations, num_compilations
from rec_dist.packing.grouped_prompt import GroupedPrompt

SHAPE = Shape(hidden=256, layers=2, heads=4, kv_heads=2, intermediate=512, vocab=1024)
SMALL = replace(TINY, hidden=64)  # for tiny shapes: heads of 16, the narrowest that FlexAttention takes
POINTS = (Point(90, 8, 3, 3), Point(33, 8, 15, 4), Point(200, 8, 1, 2), Point(120, 8, 7, 6))  # 354, 580, 428 and 1,056 rows
TINY_POINTS = (Point(20, 4, 3, 1), Point(9, 4, 5, 2), Point(30, 4, 1, 1), Point(12, 4, 3, 3))  # 32, 54, 36 and 72 rows


def prompts_of(point: Point, vocab: int) -> list[GroupedPrompt]:
    """The prompts of a micro-batch, each with one group."""
    case = make_case(point, vocab)
    pairs = zip(case.prompts, case.completions, strict=True)
    return [prompt_of(prompt, [len(prompt) - 1], [answers], key) for key, (prompt, answers) in enumerate(pairs)]


def compare(place: Place) -> Row:
    """Compares ours with the dense mask on micro-batches of different lengths, prompts and numbers of completions.

    Returns the largest difference of log-probs, the norm of the difference of gradients over their norm, and the number of
    graphs that were compiled after the second micro-batch, whose length may take a compilation of its own.
    """
    shape, points = (SMALL, TINY_POINTS) if place.tiny else (SHAPE, POINTS)
    device = place.device
    model: Any = build_model(shape, device=device).train()
    config = model.get_base_model().config
    ours, dense = choose_attention("auto", config, device=device), choose_attention("sdpa", config, device=device)
    allow_compilations()
    logps, gradients, compiled = {}, {}, 0
    for attention in (dense, ours):
        model.get_base_model().set_attn_implementation(attention)
        logps[attention], gradients[attention] = [], []
        for number, point in enumerate(points):
            if number == 2:
                compiled = num_compilations()
            model.zero_grad(set_to_none=True)
            runner = Grouped(model, [prompts_of(point, shape.vocab)], 1, device=device)
            loss, _, found = runner.scorer(runner.batches[0])
            loss.backward()
            logps[attention].append(found.detach())
            gradients[attention].append(_flat(model))
    apart = [(here - there).norm() / there.norm() for here, there in zip(gradients[ours], gradients[dense], strict=True)]
    return {
        "method": f"{ours} against {dense}",
        "logps apart": max(float((a - b).abs().max()) for a, b in zip(logps[ours], logps[dense], strict=True)),
        "gradients apart": max(float(value) for value in apart),
        "compilations after the second micro-batch": num_compilations() - compiled,
    }


def _rows(point: Point) -> int:
    return point.groups * (point.prompt + (point.negatives + 1) * (point.completion - 1))


def _flat(model: Any) -> Tensor:
    """All gradients in one vector."""
    return torch.cat([weight.grad.flatten() for weight in model.parameters() if weight.grad is not None])


def run(suite: Suite) -> None:
    """One row."""
    suite.row({"method": "auto against dense"}, 30.0 if suite.place.on_gpu else 0.0, lambda: compare(suite.place))
