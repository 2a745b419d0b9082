"""One step under torch.profiler: a Chrome trace for the ranks you ask for, and on every rank the time in collectives.

Collectives are what the back ends report: NCCL's kernels on a GPU, gloo's operations on a CPU. Their time is part of
forward, backward, reduce and optimizer, and includes waiting for peers; where they overlap with computing, it is not
lost. The profiler slows the step, so the shares describe this step alone.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rec_dist.config.profile import ProfileConfig
from rec_dist.runtime.world import World

_HISTORY_ENTRIES = 200_000


@dataclass(frozen=True)
class Traced:
    """seconds: of the step. collective_seconds: those in which a collective ran. files: the names of those written."""

    seconds: float
    collective_seconds: float
    files: tuple[str, ...]


def traced(step: Callable[[], object], settings: ProfileConfig, world: World, folder: Path) -> Traced:
    """Run step() under the profiler on every rank; write files for the ranks in settings.trace_ranks."""
    from torch.profiler import ProfilerActivity, profile

    on_gpu = world.device.startswith("cuda")
    snapshot = settings.memory_snapshot and world.rank in settings.trace_ranks
    if snapshot:
        torch.cuda.memory._record_memory_history(max_entries=_HISTORY_ENTRIES)
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    began = time.perf_counter()
    with profile(activities=activities) as profiler:
        step()
    seconds = time.perf_counter() - began
    files = []
    if world.rank in settings.trace_ranks:
        files.append(f"trace-rank-{world.rank}.json")
        profiler.export_chrome_trace(str(folder / files[-1]))
    if snapshot:
        files.append(f"memory-rank-{world.rank}.pickle")
        torch.cuda.memory._dump_snapshot(str(folder / files[-1]))  # type: ignore[no-untyped-call]
        torch.cuda.memory._record_memory_history(enabled=None)
    return Traced(seconds, covered_seconds(_collectives(profiler.events(), on_gpu)), tuple(files))


def _collectives(events: Any, on_gpu: bool) -> list[tuple[float, float]]:
    """(begin, end) in microseconds of every collective."""
    prefix, device = ("nccl", "CUDA") if on_gpu else ("gloo:", "CPU")
    return [
        (event.time_range.start, event.time_range.end)
        for event in events
        if event.device_type.name == device and event.name.lower().startswith(prefix)
    ]


def covered_seconds(intervals: Iterable[tuple[float, float]]) -> float:
    """Seconds that at least one of the intervals (begin, end), in microseconds, covers.

    >>> covered_seconds([(0, 4e6), (1e6, 2e6), (6e6, 7e6)])
    5.0
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total / 1e6
