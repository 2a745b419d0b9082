"""Changes that make a run fit its devices, single and combined, checked by the same formula as the plan."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

from rec_dist.sizing.memory import Setup
from rec_dist.sizing.shares import gathered_sizes, live_elements

_GRAIN = 128  # tokens
_MOST_WORKERS = 4096
Needs = Callable[[Setup], float]  # bytes


@dataclass(frozen=True)
class Change:
    """Configuration keys with their new values, and the bytes that a device then needs."""

    keys: dict[str, Any]
    needs: float
    setup: Setup


def largest_micro_batch(setup: Setup, needs: Needs, room: float, *, smallest: int) -> int | None:
    """The largest train.max_tokens_per_micro_batch that needs at most `room` bytes: a multiple of 128 up to 2^20."""
    low, high = -(-max(smallest, 1) // _GRAIN), (1 << 20) // _GRAIN
    if low > high or needs(replace(setup, max_tokens=low * _GRAIN)) > room:
        return None
    while low < high:
        middle = (low + high + 1) // 2
        if needs(replace(setup, max_tokens=middle * _GRAIN)) <= room:
            low = middle
        else:
            high = middle - 1
    return low * _GRAIN


def _smaller_micro_batch(setup: Setup, needs: Needs, room: float, smallest: int) -> tuple[dict[str, Any], Setup] | None:
    tokens = largest_micro_batch(setup, needs, room, smallest=smallest)
    if tokens is None or tokens >= setup.max_tokens:
        return None
    return {"train.max_tokens_per_micro_batch": tokens}, replace(setup, max_tokens=tokens)


def _more_workers(setup: Setup, needs: Needs, room: float) -> tuple[dict[str, Any], Setup] | None:
    if setup.zero.stage == 0:
        return None
    workers = setup.workers * 2
    while workers <= _MOST_WORKERS:
        larger = replace(setup, workers=workers)
        if needs(larger) <= room:
            return {"cluster.num_workers": workers}, larger
        workers *= 2
    return None


def smallest_live(setup: Setup) -> int | None:
    """The smallest bound on gathered elements that still loads one module ahead of its use; None if it would change nothing."""
    sizes = gathered_sizes(setup.parameters, setup.zero)
    if setup.workers == 1 or not sizes:
        return None
    smaller = replace(setup, zero=setup.zero.within(2 * max(sizes)))
    return 2 * max(sizes) if live_elements(setup.parameters, smaller.zero) < live_elements(setup.parameters, setup.zero) else None


def _switches(setup: Setup, sharded: Setup) -> Iterator[tuple[dict[str, Any], Setup]]:
    """The changes that only cost time. sharded: the same setup under ZeRO stage 3."""
    if setup.zero.stage < 3 and setup.workers > 1:
        yield {"cluster.zero_stage": 3}, replace(setup, zero=sharded.zero)
    if not setup.checkpointing:
        yield {"model.activation_checkpointing": True}, replace(setup, checkpointing=True)
    if not setup.flex and setup.on_gpu:
        yield {"model.attention": "flex"}, replace(setup, attention="flex")
    live = smallest_live(setup)
    if live is not None:
        yield {"cluster.max_live_parameters": live}, replace(setup, zero=setup.zero.within(live))


def single_changes(setup: Setup, sharded: Setup, needs: Needs, room: float, *, smallest: int) -> list[Change]:
    """Every single change that makes the run fit, the cheapest first."""
    found = [*_switches(setup, sharded), _smaller_micro_batch(setup, needs, room, smallest), _more_workers(setup, needs, room)]
    changes = [Change(keys, needs(changed), changed) for keys, changed in (entry for entry in found if entry is not None)]
    return [change for change in changes if change.needs <= room]


def combined_change(setup: Setup, sharded: Setup, needs: Needs, room: float, *, smallest: int) -> Change | None:
    """The first combination that fits: all switches, plus a smaller micro-batch, or more workers, or both. None if none fits."""
    keys: dict[str, Any] = {}
    current = setup
    for _ in range(4):  # each switch changes which others apply
        for changed_keys, changed in _switches(current, sharded):
            if changed_keys.keys() - keys.keys():
                keys, current = keys | changed_keys, changed
                break
    candidates: list[tuple[dict[str, Any], Setup]] = [(keys, current)]
    for step in (_smaller_micro_batch(current, needs, room, smallest), _more_workers(current, needs, room)):
        if step is not None:
            candidates.append((keys | step[0], step[1]))
    workers = current.workers
    while workers < _MOST_WORKERS:
        workers *= 2
        larger = replace(current, workers=workers)
        smaller = _smaller_micro_batch(larger, needs, room, smallest)
        if smaller is not None and current.zero.stage:
            candidates.append((keys | {"cluster.num_workers": workers} | smaller[0], smaller[1]))
            break
    for candidate_keys, candidate in candidates:
        if candidate_keys and needs(candidate) <= room:
            return Change(candidate_keys, needs(candidate), candidate)
    return None
