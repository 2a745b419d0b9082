"""What a person sees of a run: its messages, and a bar on a terminal or plain lines in a log. It only reads the run directory."""

import logging
import re
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm import tqdm

from rec_dist.runtime.duration import duration
from rec_dist.runtime.messages import WARNING, say, visible
from rec_dist.runtime.repeating import repeating
from rec_dist.runtime.run_directory import RunDirectory

logger = logging.getLogger(__name__)
_POLL_SECONDS = 0.3
_PLAIN_SECONDS = 15.0  # a log gets a line this often
_TIME = re.compile(r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ")  # begins each line of log.txt


class _Watch:
    def __init__(self, run: RunDirectory, out: TextIO) -> None:
        self._run, self._out = run, out
        self._position = run.log_size()
        self._bar: Any = None
        self._shown: tuple[str, int] | None = None
        self._last_line = 0.0

    def tick(self) -> None:
        """Shows what is new."""
        lines, self._position = self._run.log_after(self._position)
        for line in lines:
            tqdm.write(visible(line), file=self._out) if self._bar is not None else say(line, self._out)
        state = self._run.read_progress()
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
def watching(run: RunDirectory, out: TextIO | None = None) -> Iterator[None]:
    """Inside, a thread shows the run on `out` (standard error)."""
    run.clear_progress()
    watch = _Watch(run, out or sys.stderr)
    try:
        with _repeating(watch.tick):
            yield
    finally:
        watch.close()


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
