"""What a person sees of a run: its messages, and a bar on a terminal or plain lines in a log. It only reads the run directory."""

import logging
import math
import os
import re
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from typing import Any, TextIO

from tqdm import tqdm

from rec_dist.launch.ray_cluster import leave
from rec_dist.launch.watchdog import ProgressWatchdog
from rec_dist.runtime.duration import duration
from rec_dist.runtime.messages import WARNING, say, visible
from rec_dist.runtime.repeating import repeating
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.runtime.stacks import write_own_stacks

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.3
_PLAIN_SECONDS = 15.0  # a log gets a line this often
_LOOKS = 10  # for progress in cluster.hang_seconds
_STACKS_SECONDS = 5.0  # for writing the stacks, also on a disk that is gone
_EXIT_FAILED = 1
_STACKS_NAME = ".stacks.txt"  # hidden, so that no command takes the folder for another's
_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # begins each line of log.txt


class _Watch:
    def __init__(self, run: RunDirectory, out: TextIO, look_seconds: float) -> None:
        """look_seconds: between two reads of the beats of all workers."""
        self._run, self._out = run, out
        self._workers, self._look_seconds, self._looked = ProgressWatchdog(run.attempt), look_seconds, time.monotonic()
        self._position = run.log_size()
        self._bar: Any = None
        self._shown: tuple[str, int] | None = None
        self._last_line = 0.0
        self._seen: object = None
        self.changed = time.monotonic()  # when progress, a line or a sign of life of a worker was last seen

    def tick(self) -> None:
        """Shows what is new."""
        lines, self._position = self._run.log_after(self._position)
        for line in lines:
            tqdm.write(visible(line), file=self._out) if self._bar is not None else say(line, self._out)
        state = self._run.read_progress()
        if (self._position, state) != self._seen:
            self._seen, self.changed = (self._position, state), time.monotonic()
        if time.monotonic() - self._looked >= self._look_seconds:  # rank 0 alone tells progress, and may end before the others
            self._looked = time.monotonic()
            self.changed = max(self.changed, self._looked - self._workers.look()[0])
        if state is None or (state["phase"], state["done"]) == self._shown:
            return
        if self._out.isatty():
            self._show_bar(state)
        else:
            self._show_line(state)

    def _show_bar(self, state: dict[str, Any]) -> None:
        if self._bar is None or self._bar.desc != visible(state["phase"]):
            self.close()
            # tqdm counts the steps before a restart as done in no time, so the line of training shows the worker's own estimate.
            form = {"bar_format": "{desc}: {percentage:3.0f}%|{bar}| {n_fmt}/{total_fmt} [{elapsed}{postfix}]"}
            own = form if state["phase"] == "train" else {}
            self._bar = tqdm(total=state["total"], desc=visible(state["phase"]), file=self._out, dynamic_ncols=True, **own)
        self._bar.n = state["done"]
        self._bar.set_postfix_str(visible(_note(state)))
        self._shown = (state["phase"], state["done"])

    def _show_line(self, state: dict[str, Any]) -> None:
        new_phase = self._shown is None or self._shown[0] != state["phase"]
        if not new_phase and state["done"] < state["total"] and time.monotonic() - self._last_line < _PLAIN_SECONDS:
            return
        self._last_line = time.monotonic()
        self._shown = (state["phase"], state["done"])
        note = _note(state)
        say(f"{state['phase']} {state['done']}/{state['total']}{f'  {note}' if note else ''}", self._out)

    def close(self) -> None:
        """Leaves the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
            self._bar = None


def _note(state: dict[str, Any]) -> str:
    """The worker's note, and the time left where the worker estimates it: `loss 5.9, 13122 tokens/s, 2 min 5 s left`."""
    left = state.get("seconds_left")
    return ", ".join([part for part in (state["note"], f"{duration(left)} left" if left is not None else "") if part])


@contextmanager
def watching(run: RunDirectory, out: TextIO | None = None, *, hang_seconds: float = 0.0) -> Iterator[None]:
    """Inside, a thread shows the run on `out` (standard error).

    hang_seconds: ends this process, with its stacks in .stacks.txt, when the run shows no progress for so long; 0: never.
    """
    run.clear_progress()
    watch = _Watch(run, out or sys.stderr, hang_seconds / _LOOKS if hang_seconds else math.inf)
    guard = repeating(lambda: _end_if_hung(watch, run, hang_seconds), hang_seconds / _LOOKS, name="hang")
    try:
        # In a thread apart from the one that shows: reading may hang, too.
        with _repeating(watch.tick), guard if hang_seconds else nullcontext():
            yield
    finally:
        watch.close()


def _end_if_hung(watch: _Watch, run: RunDirectory, hang_seconds: float) -> None:
    quiet = time.monotonic() - watch.changed
    if quiet <= hang_seconds:
        return
    path = run.path / _STACKS_NAME
    say(
        f"failed: hang: no progress for {quiet:.0f} s (cluster.hang_seconds {hang_seconds:g}); stacks in {path}. What was written "
        "before is kept: run the same command again",
        sys.stderr,
    )

    def write() -> None:
        with suppress(OSError):
            write_own_stacks(path)

    writer = threading.Thread(target=write, daemon=True)
    writer.start()
    writer.join(_STACKS_SECONDS)
    leave()
    os._exit(_EXIT_FAILED)  # nothing gentler ends a thread that hangs in a library


@contextmanager
def logging_lines(run: RunDirectory) -> Iterator[None]:
    """Inside, a thread hands each line of the run's log to `logging`, without its time."""
    run.clear_progress()
    position = run.log_size()

    def tick() -> None:
        nonlocal position
        lines, position = run.log_after(position)
        for line in lines:
            text = _TIME.sub("", line)
            level = logging.WARNING if text.startswith(WARNING) else logging.INFO
            logger.log(level, text.removeprefix(WARNING))

    with _repeating(tick):
        yield


@contextmanager
def _repeating(tick: Callable[[], None]) -> Iterator[None]:
    """As `repeating`, and `tick` is called once more at the end."""
    try:
        with repeating(tick, _POLL_SECONDS, name="watch"):
            yield
    finally:
        tick()
