"""Where the host waits for the GPU during a training step, by our file and line.

torch warns at each such call under torch.cuda.set_sync_debug_mode("warn"). A wait in a micro-batch leaves the GPU without work
until the host has caught up; one a step, to read its sums, is meant. Two steps that differ only in their number of micro-batches
tell the two apart. torch does not know of waits inside extensions of others, such as NCCL.
"""

import sys
import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from benchmarks.gpu_attention import SHAPE, SMALL
from benchmarks.gpu_peers import Setting
from benchmarks.gpu_rows import NotMeasuredError, Place, Row, Suite
from benchmarks.gpu_step import DEEPSPEED, PLAIN, Bench, Case, check_available, group_of
from rec_dist.runtime.world import World

WARNING = "called a synchronizing CUDA operation"
ROOT = Path(__file__).resolve().parents[1]
_OURS = (str(ROOT / "rec_dist"), str(ROOT / "kernels" / "rec_dist_kernels"))
_FEW, _MANY = 2, 4  # micro-batches of the two steps


@contextmanager
def counted() -> Iterator[Counter[str]]:
    """Inside, counts the warnings by place: "rec_dist/training/loop.py:96", or another package's line in a thread without ours."""
    places: Counter[str] = Counter()

    def note(message: Any, category: Any, filename: str, lineno: int, file: Any = None, line: Any = None) -> None:
        if WARNING in str(message):
            places[_place(sys._getframe(1)) or f"{'/'.join(Path(filename).parts[-2:])}:{lineno}"] += 1

    with warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.showwarning = note
        yield places


def _place(frame: FrameType | None) -> str | None:
    """The innermost line of rec_dist or rec_dist_kernels on the stack."""
    while frame is not None:
        name = frame.f_code.co_filename
        if name.startswith(_OURS):
            return f"{Path(name).relative_to(ROOT)}:{frame.f_lineno}"
        frame = frame.f_back
    return None


@contextmanager
def warning_of_waits(place: Place) -> Iterator[None]:
    """Inside, torch warns when the host waits for the GPU. Raises NotMeasuredError on a CPU, where nothing waits."""
    if not place.on_gpu:
        raise NotMeasuredError("only a GPU is waited for")
    before = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode(before)


def waits_of_a_step(bench: Bench, place: Place) -> Counter[str]:
    """The waits of one step, after two that compile and allocate."""
    bench.step()
    bench.step()
    with counted() as places, warning_of_waits(place):
        bench.step()
    return places


def measure(engine: str, place: Place) -> Row:
    """The waits of a step, those that a further micro-batch adds, and their places."""
    setting = Setting("waits", SMALL if place.tiny else SHAPE, True, 128 if place.tiny else 1024)
    case, world = Case(setting, engine), World(device=place.device)
    check_available(case, place.device)
    with group_of(case, world):
        found = [waits_of_a_step(Bench(case, place, world, micro_batches=count), place) for count in (_FEW, _MANY)]
    return summary(*found)


def summary(few: Counter[str], many: Counter[str]) -> Row:
    """The row of two steps with _FEW and _MANY micro-batches."""
    added = {where: (many[where] - few[where]) / (_MANY - _FEW) for where in sorted(few | many)}
    return {
        "waits": few.total(),
        "a micro-batch": sum(added.values()),
        "places": [{"where": where, "waits": few[where], "a micro-batch": value} for where, value in added.items()],
    }


def run(suite: Suite) -> None:
    """A row for each engine."""
    for engine in (DEEPSPEED, PLAIN):
        suite.fresh()
        expected = 30.0 if suite.place.on_gpu else 0.0
        suite.row({"engine": engine}, expected, lambda engine=engine: measure(engine, suite.place))  # type: ignore[misc]
