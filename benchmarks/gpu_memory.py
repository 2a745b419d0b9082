"""The peak of a training step beside what `rec-dist plan` computes for it, part by part (rec_dist/sizing/memory.py).

On a GPU the peak is that of torch's allocator, without what the CUDA context and libraries take. On a CPU it is that of this
process's resident pages, which says little about shapes as small as the tiny ones.
"""

import tempfile
from pathlib import Path
from typing import Any

from benchmarks.gpu_attention import SMALL
from benchmarks.gpu_peers import LLAMA_1B, LLAMA_8B, Setting
from benchmarks.gpu_rows import Place, Row, Suite, bytes_in_use, peak_during
from benchmarks.gpu_step import DEEPSPEED, PLAIN, Bench, Case, check_available, group_of
from benchmarks.peer_methods import llama_config
from rec_dist.models.architecture import count_parameters, read_architecture
from rec_dist.models.flex import FLEX
from rec_dist.models.language import LoraSpec
from rec_dist.runtime.world import World
from rec_dist.sizing.memory import Setup, memory
from rec_dist.sizing.shares import Zero

_RANK = 8  # of benchmarks/peer_methods.py


def settings(*, tiny: bool) -> list[Setting]:
    """Short and long micro-batches, activations whole and recomputed, LoRA and all weights."""
    if tiny:
        return [Setting("tiny LoRA", SMALL, True, 128)]
    return [
        Setting("1B LoRA", LLAMA_1B, True, 4096),
        Setting("1B LoRA", LLAMA_1B, True, 16384),
        Setting("1B LoRA, recomputed", LLAMA_1B, True, 16384, recompute=True),
        Setting("1B full", LLAMA_1B, False, 8192),
        Setting("8B LoRA, recomputed", LLAMA_8B, True, 8192, recompute=True),
    ]


def planned(setting: Setting, place: Place, engine: str, attention: str) -> dict[str, float]:
    """The plan's parts of one worker at ZeRO stage 0."""
    spec = LoraSpec(rank=_RANK, alpha=16, dropout=0.0, target_modules="all-linear") if setting.lora else None
    with tempfile.TemporaryDirectory(prefix="gpu-memory-") as folder:
        llama_config(setting.shape).save_pretrained(folder)
        shape, parameters = read_architecture(Path(folder)), count_parameters(Path(folder), spec)
    setup = Setup(
        shape=shape,
        parameters=parameters,
        zero=Zero(0),
        workers=1,
        element=place.dtype.itemsize,
        max_tokens=setting.micro_batch,
        attention="flex" if attention == FLEX else attention,
        checkpointing=setting.recompute,
        rank=_RANK if setting.lora else 0,
        on_gpu=place.on_gpu,
    )
    parts = memory(setup, reserved=0.0, margin=0.0)
    if engine == PLAIN:  # moments in the dtype of the weights, and no copy of these
        parts["optimizer state"] = 2 * place.dtype.itemsize * parameters.trainable
    return parts


def measure(setting: Setting, place: Place) -> Row:
    """Measured and planned bytes, with DeepSpeed if it is installed."""
    engine = _engine_here(setting, place.device)
    case, world = Case(setting, engine), World(device=place.device)
    with group_of(case, world):
        before = bytes_in_use(place.device)
        bench = Bench(case, place, world)
        bench.step()  # compiles, and makes Adam's state
        found: list[int] = [peak_during(bench.step, place.device) for _ in range(2)]
        attention = bench.module.base.config._attn_implementation
    parts = planned(setting, place, engine, attention)
    peak, total = max(found) - before, sum(parts.values())
    return {
        "engine": engine,
        "peak_bytes": peak,
        "planned_bytes": total,
        "planned / measured": total / peak if peak > 0 else None,
        "parts": parts,
    }


def _engine_here(setting: Setting, device: str) -> str:
    try:
        check_available(Case(setting), device)
    except ModuleNotFoundError:
        return PLAIN
    return DEEPSPEED


def run(suite: Suite) -> None:
    """A row for each setting."""
    for setting in settings(tiny=suite.place.tiny):
        suite.fresh()
        about: dict[str, Any] = {"model": setting.name, "tokens a micro-batch": setting.micro_batch}
        expected = 20.0 if suite.place.on_gpu else 0.0
        suite.row(about, expected, lambda setting=setting: measure(setting, suite.place))  # type: ignore[misc]
