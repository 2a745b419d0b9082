"""What runs the jobs of a step of `prepare`: this process, or the processes of a cluster."""

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

Map = Callable[[Callable[[Any], Any], Sequence[Any]], Iterable[Any]]


class Jobs(NamedTuple):
    """run: (function, jobs) -> results in the order of the jobs. one_machine: whether all of them run on this machine."""

    run: Map
    one_machine: bool
