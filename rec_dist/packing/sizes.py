"""What examples cost and count, without their tokens. Every rank needs it of all examples of a step to pack and assign them."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from rec_dist.runtime.arrays import I64


@dataclass(frozen=True)
class Sizes:
    """Of U examples; all (U,) int64, equal to the properties of the same names of the built examples."""

    num_tokens: I64  # rows of the model run
    num_groups: I64
    num_scored: I64  # tokens that a loss is taken over
    num_logical_tokens: I64  # tokens with every prompt written out before each of its completions


@dataclass(frozen=True)
class OneByOne:
    """Implements methods.task.DrawnExamples for examples that are built one at a time. make: place -> the built example."""

    sizes: Sizes
    make: Callable[[int], Any]

    def build(self, chosen: Sequence[int]) -> list[Any]:
        """Build the examples at these places."""
        return [self.make(place) for place in chosen]
