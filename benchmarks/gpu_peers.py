"""Whole training steps on a GPU: a, b and d of benchmarks/peer_methods.py at 1B and 8B shapes, bfloat16, random weights.

Each method puts as many whole groups into a micro-batch as fit its token budget, but at least one. The measure is groups a
second. MFU counts the work that a method itself does: 2 FLOP a weight and token forward, as much backward, and as much again
if the weights train. Attention's scores and values are counted as dense over what a row sees. For a, the reference forward
pass counts too.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn

from benchmarks.gpu_attention import SMALL, prompts_of
from benchmarks.gpu_rows import Place, Row, Suite
from benchmarks.peer_methods import Grouped, Published, Replicated, Shape, build_model, make_case
from benchmarks.peer_targets import Point
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.flex import allow_compilations
from rec_dist.training.flops import known_peak

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


def settings(*, tiny: bool) -> list[Setting]:
    """The settings, most important first, since time may run out."""
    if tiny:
        return [Setting("tiny LoRA", SMALL, True, 256)]
    return [
        Setting("8B LoRA", LLAMA_8B, True, 8192),
        Setting("1B LoRA", LLAMA_1B, True, 16384),
        Setting("1B full", LLAMA_1B, False, 16384),
        Setting("8B LoRA, recomputed", LLAMA_8B, True, 16384, recompute=True),
    ]


def points(*, tiny: bool) -> list[Point]:
    """P and K of each point; the number of groups follows from the token budget."""
    if tiny:
        return [Point(20, 8, 3, 1)]
    return [Point(512, 8, 3, 1), Point(512, 8, 15, 1), Point(128, 8, 3, 1)]


def build_setting(setting: Setting, place: Place) -> nn.Module:
    """Builds the model of a setting, in training mode."""
    model: Any = build_model(setting.shape, lora=setting.lora, dtype=place.dtype, device=place.device)
    if setting.recompute:
        inner = model.get_base_model() if setting.lora else model
        inner.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        inner.enable_input_require_grads()
    trained: nn.Module = model.train()
    return trained


class SharedModel:
    """One model for all methods of a setting, since two of 8B would not leave room for the activations.

    Ours changes the classes of its layers (rec_dist/models/fused_lora.py); `plain` takes that back, because peers do not have it.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self._classes = [(layer, type(layer)) for layer in model.modules()]

    def plain(self) -> None:
        """Makes all layers, and PEFT's adapters with them, run as they were built."""
        for layer, kind in self._classes:
            layer.__class__ = kind
            getattr(layer, "lora_variant", {}).clear()


def groups_of(method: str, point: Point, micro_batch: int) -> int:
    """How many whole groups fit, at least one."""
    size = point.negatives + 1
    rows = {"a": size * (point.prompt + point.completion), "b": size * (point.prompt + point.completion - 1)}
    return max(1, micro_batch // rows.get(method, point.prompt + size * (point.completion - 1)))


def build_method(method: str, shared: SharedModel, setting: Setting, point: Point, device: str) -> Any:
    """Builds the method with as many groups as fit. Ours fuses LoRA and uses the attention that model.attention=auto chooses."""
    shared.plain()
    model = shared.model
    base = model.get_base_model() if setting.lora else model
    base.set_attn_implementation(choose_attention("auto" if method == "d" else "sdpa", base.config, device=device))
    allow_compilations()
    point = replace(point, groups=groups_of(method, point, setting.micro_batch))
    if method == "d":
        prompts = prompts_of(point, setting.shape.vocab)
        return Grouped(model, [prompts], point.negatives, adapter=setting.lora, device=device)
    case = make_case(point, setting.shape.vocab)
    case = replace(case, prompts=case.prompts.to(device), completions=case.completions.to(device))
    return Published(model, [case]) if method == "a" else Replicated(model, [case], adapter=setting.lora)


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


def bf16_peak(place: Place) -> float | None:
    """FLOP/s of the GPU by its data sheet, in bfloat16; None for a CPU or an unknown GPU."""
    found = known_peak(torch.cuda.get_device_name()) if place.on_gpu else None
    return found[0] if found else None


def run(suite: Suite) -> None:
    """A row for each method at each point of each model, ours first."""
    for setting in settings(tiny=suite.place.tiny):
        suite.fresh()
        about = {"model": setting.name, "tokens a micro-batch": setting.micro_batch}
        build = lambda setting=setting: SharedModel(build_setting(setting, suite.place))  # type: ignore[misc]
        shared = suite.build({**about, "method": "all"}, 20.0 if suite.place.on_gpu else 0.0, build)
        for point in points(tiny=suite.place.tiny) if shared is not None else ():
            _run_point(suite, shared, setting, point, about)
        del shared


def _run_point(suite: Suite, shared: SharedModel, setting: Setting, point: Point, about: Row) -> None:
    speeds: dict[str, float] = {}
    for method in ("d", "b", "a") if setting.lora else ("d", "b"):

        def measure(method: str = method) -> Row:
            runner = build_method(method, shared, setting, point, suite.place.device)
            timed = suite.time(runner.step, clear=lambda: shared.model.zero_grad(set_to_none=True))
            seconds = timed["milliseconds"]["median"] / 1e3
            speeds[method] = runner.groups / seconds
            peak = bf16_peak(suite.place)
            return {
                **timed,
                "groups": runner.groups,
                "tokens": runner.num_tokens,
                "groups/s": speeds[method],
                "tokens/s": runner.num_tokens / seconds,
                "mfu": step_flops(method, setting, point) / seconds / peak if peak else None,
                "d is x": speeds["d"] / speeds[method] if "d" in speeds else None,
            }

        suite.row(
            {**about, "P": point.prompt, "K": point.negatives, "method": method}, 12.0 if suite.place.on_gpu else 0.0, measure
        )
