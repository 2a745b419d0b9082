"""Whole training steps on a GPU: a, b and d of benchmarks/peer_methods.py at 1B and 8B shapes, bfloat16, random weights.

Each method puts as many whole groups into a micro-batch as fit its token budget, but at least one. The measure is groups a
second. MFU counts the work that a method itself does: 2 FLOP a weight and token forward, as much backward, and as much again
if the weights train. Attention's scores and values are counted as dense over what a row sees. For a, the reference forward
pass counts too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch

from benchmarks.peer_methods import TINY, Grouped, Published, Replicated, Shape, build_model, make_case, prompt_of
from benchmarks.peer_targets import Point
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.flex import allow_compilations

LLAMA_1B = Shape(hidden=2048, layers=16, heads=32, kv_heads=8, intermediate=8192, vocab=128256)
LLAMA_8B = Shape(hidden=4096, layers=32, heads=32, kv_heads=8, intermediate=14336, vocab=128256, tied=False)


@dataclass(frozen=True)
class Setting:
    """One model in one mode. micro_batch: the token budget of a forward pass."""

    name: str
    shape: Shape
    lora: bool
    micro_batch: int
    recompute: bool = False


def settings(device: str) -> list[Setting]:
    """The settings, most important first, since time may run out."""
    if device == "cpu":
        return [Setting("tiny LoRA", TINY, True, 256)]
    return [
        Setting("8B LoRA", LLAMA_8B, True, 8192),
        Setting("1B LoRA", LLAMA_1B, True, 16384),
        Setting("1B full", LLAMA_1B, False, 16384),
        Setting("8B LoRA, recomputed", LLAMA_8B, True, 16384, recompute=True),
    ]


def points(device: str) -> list[Point]:
    """P and K of each point; the number of groups follows from the token budget."""
    if device == "cpu":
        return [Point(20, 8, 3, 1)]
    return [Point(512, 8, 3, 1), Point(512, 8, 15, 1), Point(128, 8, 3, 1)]


def build_setting(setting: Setting, device: str) -> Any:
    """Builds the model of a setting, in training mode."""
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    model: Any = build_model(setting.shape, lora=setting.lora, dtype=dtype, device=device)
    if setting.recompute:
        inner = model.get_base_model() if setting.lora else model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    return model.train()


def groups_of(method: str, point: Point, micro_batch: int) -> int:
    """How many whole groups fit, at least one."""
    size = point.negatives + 1
    rows = {"a": size * (point.prompt + point.completion), "b": size * (point.prompt + point.completion - 1)}
    return max(1, micro_batch // rows.get(method, point.prompt + size * (point.completion - 1)))


def build_method(method: str, model: Any, setting: Setting, point: Point, device: str) -> Any:
    """Builds the method with as many groups as fit. Ours uses the attention that model.attention=auto chooses on `device`."""
    base = model.get_base_model() if setting.lora else model
    base.set_attn_implementation(choose_attention("auto" if method == "d" else "sdpa", base.config, device=device))
    allow_compilations()
    point = replace(point, groups=groups_of(method, point, setting.micro_batch))
    case = make_case(point, setting.shape.vocab)
    if method in ("a", "b"):
        case = replace(case, prompts=case.prompts.to(device), completions=case.completions.to(device))
        return Published(model, [case]) if method == "a" else Replicated(model, [case], adapter=setting.lora)
    pairs = zip(case.prompts, case.completions, strict=True)
    prompts = [prompt_of(prompt, [len(prompt) - 1], [answers], key) for key, (prompt, answers) in enumerate(pairs)]
    return Grouped(model, [prompts], point.negatives, adapter=setting.lora, device=device)


def step_flops(method: str, setting: Setting, point: Point) -> float:
    """The FLOP of one step of the method, counted as the module's docstring says."""
    shape, groups = setting.shape, groups_of(method, point, setting.micro_batch)
    head_dim = shape.hidden // shape.heads
    attention = shape.hidden * head_dim * (2 * shape.heads + 2 * shape.kv_heads)
    weights = shape.layers * (attention + 3 * shape.hidden * shape.intermediate)
    size, whole = point.negatives + 1, point.prompt + point.completion
    triangle = lambda rows: rows * rows / 2
    if method == "d":
        tokens = point.prompt + size * (point.completion - 1)
        pairs = triangle(point.prompt) + size * (point.completion - 1) * (point.prompt + point.completion / 2)
        scored: float = 1 + size * (point.completion - 1)
    else:
        length = whole if method == "a" else whole - 1
        tokens, pairs = size * length, size * triangle(length)
        scored = tokens if method == "a" else size * point.completion
    forward = 2 * tokens * weights + 4 * pairs * shape.hidden * shape.layers + 2 * scored * shape.hidden * shape.vocab
    passes = (2 if setting.lora else 3) + (1 if method == "a" else 0) + (1 if setting.recompute else 0)
    return float(groups * passes * forward)
