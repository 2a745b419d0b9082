"""What ZeRO shares out over the workers of a run, and what stage 3 gathers, in elements. Pure functions of plain numbers."""

from dataclasses import dataclass, replace

from rec_dist.models.known_decoders import Parameters


@dataclass(frozen=True)
class Zero:
    """What engine/settings.py configures in DeepSpeed, in elements. stage: 0 to 3.

    layers: stage 3 gathers a decoder layer as a whole (engine/engine.py), in place of one parameter after another.
    """

    stage: int
    persistence: int = 0  # parameters up to this size stay whole on every rank
    reuse: int = 0  # a gathered parameter stays if its next use is within this many elements
    prefetch: int = 0
    bucket: int = 0  # of gradients
    hpz: int = 1  # workers that share a second copy of the weights, from which they gather; 1: there is none
    layers: bool = False

    def within(self, live: int) -> "Zero":
        """The same with at most `live` elements kept or prefetched (engine/settings.py)."""
        return replace(self, reuse=min(self.reuse, live), prefetch=min(self.prefetch, live))


def shard(elements: int, workers: int) -> int:
    """Elements of a parameter that one worker holds: equal parts, the last one padded."""
    return -(-elements // workers)


def held_parameters(parameters: Parameters, zero: Zero, workers: int) -> int:
    """Elements that a rank holds between steps: all below stage 3; from there a shard of each, but persistent ones whole."""
    if zero.stage < 3:
        return parameters.total
    return sum(size if size <= zero.persistence else shard(size, workers) for size in parameters.sizes)


def persistent_shards(parameters: Parameters, zero: Zero, workers: int) -> int:
    """Elements of the shards that persistent parameters have in addition to their whole copies."""
    if zero.stage < 3:
        return 0
    return sum(shard(size, workers) for size in parameters.sizes if size <= zero.persistence)


def secondary_elements(parameters: Parameters, zero: Zero) -> int:
    """Elements of a rank's shard of the second copy that each group of `hpz` workers holds (ZeRO++ hpZ)."""
    if zero.stage < 3 or zero.hpz == 1:
        return 0
    return sum(shard(size, zero.hpz) for size in parameters.sizes)


def gathered_sizes(parameters: Parameters, zero: Zero) -> list[int]:
    """Elements that stage 3 gathers at once, in the order of use: a decoder layer if zero.layers, else a parameter.

    A tied head is used again at the end.
    """
    if zero.stage < 3:
        return []
    groups = parameters.layers if zero.layers and parameters.layers else (-1,) * len(parameters.sizes)
    sizes: list[int] = []
    last = -1
    for size, layer in zip(parameters.sizes, groups, strict=True):
        if size <= zero.persistence:
            continue
        if layer >= 0 and layer == last:
            sizes[-1] += size
        else:
            sizes.append(size)
        last = layer
    return [*sizes, parameters.head] if parameters.tied and parameters.head > zero.persistence else sizes


def kept_elements(sizes: list[int], zero: Zero, *, tied: bool) -> int:
    """Elements that stay gathered from the forward pass to the backward pass.

    The last modules stay, as long as what DeepSpeed counts between their two uses is below the reuse distance: everything
    after them, twice. Whole layers: once, because DeepSpeed's search ends at the module around the model, which begins the
    backward pass and holds every parameter.
    """
    kept, uses = 0, 1 if zero.layers else 2
    for size in reversed(sizes):
        if uses * kept >= zero.reuse:
            break
        kept += size
    whole = sum(sizes) - (sizes[-1] if tied and sizes else 0)
    return min(kept, whole)


def live_elements(parameters: Parameters, zero: Zero) -> int:
    """Most elements gathered at once: what is kept for the backward pass or the largest module, and the prefetched ones.

    A layer gathered as a whole arrives in one buffer, from which its parameters are then copied.
    """
    sizes = gathered_sizes(parameters, zero)
    if not sizes:
        return 0
    tied = parameters.tied and parameters.head > zero.persistence
    whole = sum(sizes) - (parameters.head if tied else 0)
    buffer = max(sizes) if zero.layers and parameters.layers else 0
    return min(max(kept_elements(sizes, zero, tied=tied), max(sizes)) + zero.prefetch, whole) + buffer
