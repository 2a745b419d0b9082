"""Real processes that hang: one waits for a lock, one is stopped. Both leave a Python stack, and neither is left."""

import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

from rec_dist.runtime.heartbeat import read_beats
from rec_dist.runtime.stacks import end_group

CHILD = """
import sys, threading
from pathlib import Path
from rec_dist.runtime.heartbeat import Heartbeat
def waits_for_a_peer():
    threading.Event().wait()
heart = Heartbeat(Path(sys.argv[1]), int(sys.argv[2]), "here")
heart.beat("step", 8)
waits_for_a_peer()
"""


def start(folder: Path, rank: int) -> subprocess.Popen[bytes]:
    return subprocess.Popen([sys.executable, "-c", CHILD, str(folder), str(rank)])


def state_of(child: subprocess.Popen[bytes]) -> str:
    """The kernel's letter for the process's state."""
    return Path(f"/proc/{child.pid}/stat").read_text(encoding="ascii").rpartition(")")[2].split()[0]


def test_what_each_was_doing_and_their_end(tmp_path: Path) -> None:
    folder, stacks = tmp_path / "attempt", tmp_path / "stacks"
    children = [start(folder, rank) for rank in range(3)]
    try:
        deadline = time.monotonic() + 60
        while len(read_beats(folder)) < 3:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        children[1].send_signal(signal.SIGSTOP)
        while state_of(children[1]) != "T":  # on a busy machine a signal takes its time
            assert time.monotonic() < deadline
            time.sleep(0.01)
        children[2].kill()
        children[2].wait()
        lines = end_group(read_beats(folder), folder, stacks)
        assert [child.wait(timeout=10) for child in children] == [-9, -9, -9]
    finally:
        for child in children:
            child.kill()
    what = [line.partition(": ")[2] for line in lines]
    assert what[1:] == ["stopped by a signal, in phase step of step 8", "gone, in phase step of step 8"]
    assert what[0].startswith(("state S", "state R"))  # R: caught on its way into the wait
    texts = [(stacks / f"rank-{rank}.txt").read_text(encoding="utf-8") for rank in (0, 1)]
    assert all("waits_for_a_peer" in text for text in texts)
    assert "state T, wchan" in texts[1]
    assert not (stacks / "rank-2.txt").exists()


def test_another_process_with_the_number_is_left_alone(tmp_path: Path) -> None:
    child = start(tmp_path, 0)
    try:
        while not read_beats(tmp_path):
            time.sleep(0.05)
        (beat,) = read_beats(tmp_path)
        assert "gone" in end_group([replace(beat, born=beat.born - 1)], tmp_path, None)[0]
        assert child.poll() is None
        end_group([beat], tmp_path, None)
        assert child.wait(timeout=10) == -9
    finally:
        child.kill()
