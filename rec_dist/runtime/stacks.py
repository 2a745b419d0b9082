"""Records what the processes of a hung group are doing, and kills them. Runs on their machine.

A running process writes its own Python stacks when it gets a signal. A stopped process cannot: once its peers are dead, it is
continued just long enough to write them. The kernel's view of each (its state, what it waits for) is written in any case.
"""

import faulthandler
import os
import signal
import time
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

from rec_dist.runtime.heartbeat import STACK_SIGNAL, Beat, born, stack_path

_TIMEOUT_SECONDS = 3.0


def end_group(beats: Sequence[Beat], folder: Path, stacks: Path | None) -> list[str]:
    """Writes what each process of `beats` was doing to stacks/rank-N.txt, then kills it. Returns a line for each.

    stacks: None writes nothing. Leaves a process alone that has ended, also when another one has its number now.
    """
    alive = [beat for beat in beats if born(beat.pid) == beat.born]
    states = {beat.rank: _state(beat.pid) for beat in alive}
    stopped = [beat for beat in alive if states[beat.rank] in ("T", "t")]
    running = [beat for beat in alive if beat not in stopped]
    headers = {beat.rank: _kernel_view(beat) for beat in alive if stacks is not None}
    if stacks is not None:
        _ask(running, folder)
    _kill(running)
    if stacks is not None:
        _ask(stopped, folder)
    _kill(stopped)
    lines = []
    for beat in beats:
        state = states.get(beat.rank)
        what = "gone" if state is None else "stopped by a signal" if state in ("T", "t") else f"state {state}"
        lines.append(f"rank {beat.rank} (process {beat.pid}): {what}, in phase {beat.phase} of step {beat.step}")
        if stacks is not None and beat.rank in headers:
            stacks.mkdir(parents=True, exist_ok=True)
            text = _read(stack_path(folder, beat.rank)) or "no Python stack: the process did not answer the signal\n"
            (stacks / f"rank-{beat.rank}.txt").write_text(f"{lines[-1]}\n\n{text}\n{headers[beat.rank]}\n", encoding="utf-8")
    return lines


def write_own_stacks(path: Path) -> None:
    """Writes the stacks of all threads of this process. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", encoding="utf-8") as handle:
        faulthandler.dump_traceback(handle, all_threads=True)


def _ask(beats: Sequence[Beat], folder: Path) -> None:
    """Makes each process write its stacks, and waits until all have."""
    for beat in beats:
        _send(beat, STACK_SIGNAL)
        _send(beat, signal.SIGCONT)
    deadline = time.monotonic() + _TIMEOUT_SECONDS
    waiting = list(beats)
    while waiting and time.monotonic() < deadline:
        waiting = [beat for beat in waiting if "most recent call first" not in _read(stack_path(folder, beat.rank))]
        time.sleep(0.05)
    if beats:
        time.sleep(0.2)  # the stacks of the other threads follow the first


def _kill(beats: Sequence[Beat]) -> None:
    for beat in beats:
        _send(beat, signal.SIGKILL)


def _send(beat: Beat, number: signal.Signals) -> None:
    if born(beat.pid) == beat.born:
        with suppress(ProcessLookupError):
            os.kill(beat.pid, number)


def _state(pid: int) -> str:
    return _read(Path(f"/proc/{pid}/stat")).rpartition(")")[2].split()[0] or "?"


def _kernel_view(beat: Beat) -> str:
    """State, wait channel and system call of each thread, as /proc has them."""
    lines = []
    for task in sorted(Path(f"/proc/{beat.pid}/task").glob("*"), key=lambda path: int(path.name)):
        fields = {name: " ".join(_read(task / name).split()) or "?" for name in ("comm", "wchan", "syscall")}
        state = _read(task / "stat").rpartition(")")[2].split()[:1] or ["?"]
        lines.append(
            f"thread {task.name} {fields['comm']}: state {state[0]}, wchan {fields['wchan']}, "
            f"syscall {fields['syscall'].split()[0]}"
        )
    return "\n".join(lines)


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
