"""Training steps of 1B and 8B LoRA through the real code (benchmarks/gpu_step.py): tokens a second, MFU, memory.

ZeRO stage 0 on one GPU, and stage 2 with a process for each GPU where there are several. MFU is that of a run
(rec_dist/training/flops.py).
"""

import json
import os
import socket
import tempfile
from dataclasses import replace
from pathlib import Path

import torch

from benchmarks.gpu_attention import SMALL
from benchmarks.gpu_peers import LLAMA_1B, LLAMA_8B, Setting, bf16_peak
from benchmarks.gpu_rows import NotMeasuredError, Place, Row, Suite, timed
from benchmarks.gpu_step import DEEPSPEED, PLAIN, Bench, Case, check_available, group_of
from rec_dist.runtime.world import World


def cases(*, tiny: bool) -> list[Case]:
    """The rows of one process, most important first, since time may run out."""
    if tiny:
        setting = Setting("tiny LoRA", SMALL, True, 128)
        return [Case(setting), Case(setting, PLAIN)]
    large, small = Setting("8B LoRA", LLAMA_8B, True, 8192), Setting("1B LoRA", LLAMA_1B, True, 16384)
    return [Case(large), Case(large, fused=True), Case(small), Case(large, PLAIN), Case(small, PLAIN)]


def measure(case: Case, place: Place, world: World, repeats: int, *, zero_stage: int = 0) -> Row:
    """Time, speed and memory of a step."""
    check_available(case, place.device)
    with group_of(case, world):
        bench = Bench(case, place, world, zero_stage=zero_stage)
        row = timed(bench.step, place.device, repeats=repeats)
        return {**row, **bench.speed(row["milliseconds"]["median"], bf16_peak(place), world), "GPUs": world.size}


def measure_several(case: Case, place: Place, size: int, repeats: int, *, zero_stage: int) -> Row:
    """The same with `size` processes, each with a device of its own; the row is that of rank 0."""
    check_available(case, place.device)
    with tempfile.TemporaryDirectory(prefix="gpu-engine-") as folder:
        out = Path(folder) / "row.json"
        arguments = (size, free_port(), case, place, repeats, zero_stage, out)
        torch.multiprocessing.spawn(_one_of_several, arguments, nprocs=size)  # type: ignore[no-untyped-call]
        row: Row = json.loads(out.read_text(encoding="utf-8"))
        return row


def _one_of_several(rank: int, size: int, port: int, case: Case, place: Place, repeats: int, zero_stage: int, out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    own = replace(place, device=f"cuda:{rank}" if place.on_gpu else "cpu")
    world = World(rank=rank, size=size, local_rank=rank, device=own.device)
    row = measure(case, own, world, repeats, zero_stage=zero_stage)
    if world.is_main:
        out.write_text(json.dumps(row), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(suite: Suite) -> None:
    """A row for each case on one device, and one for all GPUs together."""
    place = suite.place
    for case in cases(tiny=place.tiny):
        suite.fresh()
        expected = (30.0 if case.setting.shape == LLAMA_8B else 20.0) if place.on_gpu else 0.0
        suite.row(
            about(case, stage=0),
            expected,
            lambda case=case: measure(case, place, World(device=place.device), suite.repeats),  # type: ignore[misc]
        )
    suite.fresh()
    several = Case(cases(tiny=place.tiny)[0].setting)
    suite.row(about(several, stage=2), 60.0 if place.on_gpu else 0.0, lambda: _on_all_gpus(several, place, suite.repeats))


def about(case: Case, *, stage: int) -> Row:
    """What a row is about."""
    layers = "fused" if case.fused else "plain"
    return {
        "model": case.setting.name,
        "tokens a micro-batch": case.setting.micro_batch,
        "engine": case.engine,
        "ZeRO": stage if case.engine == DEEPSPEED else "",
        "layers": layers,
    }


def _on_all_gpus(case: Case, place: Place, repeats: int) -> Row:
    size = torch.cuda.device_count() if place.on_gpu else 0
    if size < 2:
        raise NotMeasuredError(f"stage 2 is for several GPUs, and this machine has {size}")
    return measure_several(case, place, size, repeats, zero_stage=2)
