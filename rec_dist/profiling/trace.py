"""One step under torch.profiler: a Chrome trace for the ranks that were asked for, and how long collectives ran, on every rank.

Collectives are what the back ends themselves report: NCCL's kernels on a GPU, gloo's operations on a CPU. Their time lies inside
forward, backward, reduce and optimizer, not beside them; it counts waiting for peers; where they overlap with computing it is not
lost. The profiler slows the step, so shares are of that step alone.
"""

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from rec_dist.config.schema import ProfileConfig
from rec_dist.runtime.world import World

_HISTORY_ENTRIES = 200_000


@dataclass(frozen=True)
class Traced:
    """seconds of the step, of which collective_seconds had a collective under way; files written, by name."""

    seconds: float
    collective_seconds: float
    files: tuple[str, ...]


def traced(step: Callable[[], None], settings: ProfileConfig, world: World, folder: Path) -> Traced:
    """Runs step() under the profiler on every rank; files are written for the ranks in settings.trace_ranks."""
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
    """Seconds in which at least one of the intervals (begin, end), in microseconds, was under way.

    >>> covered_seconds([(0, 4e6), (1e6, 2e6), (6e6, 7e6)])
    5.0
    """
    total, reached = 0.0, float("-inf")
    for begin, end in sorted(intervals):
        total += max(end - max(begin, reached), 0.0)
        reached = max(reached, end)
    return total / 1e6
