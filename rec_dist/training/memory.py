"""The memory of a worker, and what to change when it runs out: how full the device is, what a token costs, which keys help.

On a GPU the numbers are of torch's allocator; on a CPU they are this process's resident pages, against the machine's memory.
"""

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from rec_dist.config.schema import RunConfig
from rec_dist.errors import OutOfMemoryError
from rec_dist.runtime.allocator import Holes
from rec_dist.runtime.world import World

_SAFETY = 0.9  # micro-batches differ in what they cost, and an allocator never fills a device to the last byte
_GIGA = 1e9


def in_use_bytes(device: str) -> int:
    """Bytes in use now."""
    if device.startswith("cuda"):
        return int(torch.cuda.memory_allocated(device))
    pages = int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def peak_bytes(device: str) -> int:
    """The most bytes in use so far."""
    if device.startswith("cuda"):
        return int(torch.cuda.max_memory_allocated(device))
    # Not ru_maxrss, which begins with the memory of the parent at the fork.
    found = re.search(r"^VmHWM:\s*(\d+) kB", Path("/proc/self/status").read_text(encoding="utf-8"), re.MULTILINE)
    assert found is not None
    return int(found[1]) * 1024


def total_bytes(device: str) -> int:
    """Bytes that the device has; on a CPU, those of the machine, which all of its workers share."""
    if device.startswith("cuda"):
        return int(torch.cuda.get_device_properties(device).total_memory)
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


class MemoryWatch:
    """Measures what a token of a micro-batch costs in this run."""

    def __init__(self, device: str) -> None:
        self.device = device
        self.static_bytes: int | None = None  # weights and whatever else is there before the first micro-batch
        self.bytes_per_token: float | None = None  # of the micro-batches that are done
        self.largest_micro_batch = 0
        self.loading_bytes = 0  # the peak until the model was loaded
        self._holes = None if device.startswith("cuda") else Holes()

    def start(self) -> None:
        """Call once the model is loaded, before the first micro-batch. Peaks count from here; loading has a peak of its own."""
        self.loading_bytes = peak_bytes(self.device)
        if self.device.startswith("cuda"):
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with suppress(OSError):  # a sandbox without this file counts the loading too
                Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
        self.static_bytes = in_use_bytes(self.device)

    def next_micro_batch(self, num_rows: int) -> None:
        """Call before each micro-batch of num_rows rows, when those before it have been through forward and backward passes."""
        if self.static_bytes is not None and self.largest_micro_batch:
            self.bytes_per_token = max(peak_bytes(self.device) - self.static_bytes, 0) / self.largest_micro_batch
            if self._holes is not None:
                self._holes.after_work(in_use_bytes(self.device))
        self.largest_micro_batch = max(self.largest_micro_batch, num_rows)


@dataclass(frozen=True)
class Shortage:
    """What is known when memory has run out. bytes_per_token: None when no micro-batch was done before."""

    device: str
    peak: int
    total: int
    static: int | None
    bytes_per_token: float | None
    max_tokens: int
    activation_checkpointing: bool
    zero_stage: int
    world_size: int
    trains_adapter: bool


def smaller_micro_batch(max_tokens: int, *, bytes_per_token: float | None, room_bytes: float) -> int:
    """The train.max_tokens_per_micro_batch to try next: what fits into 90 % of the room, or half when nothing was measured."""
    if bytes_per_token:
        tokens = min(int(_SAFETY * room_bytes / bytes_per_token), int(_SAFETY * max_tokens))
    else:
        tokens = max_tokens // 2
    return max(tokens // 128 * 128 or tokens, 8)


def advice(shortage: Shortage) -> str:
    """Return one line: what ran out, and what to change, the cheapest first."""
    text = f"out of memory on {shortage.device} (peak {shortage.peak / _GIGA:.1f} of {shortage.total / _GIGA:.1f} GB"
    turns: list[str] = []
    if shortage.static is None:
        text += ", before the first micro-batch)"
    else:
        smaller = smaller_micro_batch(
            shortage.max_tokens, bytes_per_token=shortage.bytes_per_token, room_bytes=shortage.total - shortage.static
        )
        basis = "half, since no micro-batch was done that could be measured"
        if shortage.bytes_per_token:
            basis = f"estimated from {shortage.bytes_per_token / 1e6:.3g} MB of activations a token"
        text += f", {shortage.static / _GIGA:.1f} GB of it before the first micro-batch)"
        turns.append(f"train.max_tokens_per_micro_batch from {shortage.max_tokens} to {smaller} ({basis})")
        if not shortage.activation_checkpointing:
            turns.append("model.activation_checkpointing=true (keeps one row of activations a layer, ~1/3 more work)")
    if shortage.zero_stage < 3 and shortage.world_size > 1:
        turns.append(
            f"cluster.zero_stage from {shortage.zero_stage} to 3 (weights shared out over {shortage.world_size} workers)"
        )
    elif shortage.zero_stage == 3 or shortage.world_size == 1:
        turns.append("a higher cluster.num_workers with cluster.zero_stage=3 (each holds a smaller part of the weights)")
    if not shortage.trains_adapter:
        turns.append("adapter.kind=lora (no gradients and no optimizer state of the base model)")
    return f"{text}; change one of: {'; '.join(turns)}"


def is_shortage(fault: BaseException) -> bool:
    """Whether a GPU or the machine ran out of memory; torch's CPU allocator has no exception of its own for it."""
    if isinstance(fault, MemoryError | torch.OutOfMemoryError):
        return True
    return isinstance(fault, RuntimeError) and "can't allocate memory" in str(fault)


@contextmanager
def advising(config: RunConfig, world: World) -> Iterator[MemoryWatch]:
    """Inside, running out of memory raises OutOfMemoryError with advice, instead of the bare fault."""
    watch = MemoryWatch(world.device)
    try:
        yield watch
    except Exception as fault:
        if not is_shortage(fault):
            raise
        shortage = Shortage(
            device=world.device,
            peak=peak_bytes(world.device),
            total=total_bytes(world.device),
            static=watch.static_bytes,
            bytes_per_token=watch.bytes_per_token,
            max_tokens=config.train.max_tokens_per_micro_batch,
            activation_checkpointing=config.model.activation_checkpointing,
            zero_stage=config.cluster.zero_stage,
            world_size=world.size,
            trains_adapter=config.adapter.kind != "none",
        )
        raise OutOfMemoryError(advice(shortage)) from fault
