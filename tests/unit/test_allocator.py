"""Freed memory is reused instead of fetched from the system a page at a time; what the user has set stays."""

import os
import subprocess
import sys

import pytest

from rec_dist.runtime.allocator import Holes

PROGRAM = """
import resource, sys
from rec_dist.runtime.allocator import keep_freed_memory
print(keep_freed_memory())
def turn():
    block = bytearray(64 << 20)
    del block
turn()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    turn()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(**environment: str) -> tuple[bool, int]:
    """Whether the setting took effect, and the page faults of five blocks of 64 MB, one after another."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM], env=clean | environment, capture_output=True, text=True, timeout=120, check=True
    )
    kept, count = done.stdout.split()
    return kept == "True", int(count)


HOLES = """
from rec_dist.runtime.allocator import Holes, keep_freed_memory
from rec_dist.training.memory import in_use_bytes
assert keep_freed_memory()
holes, size = Holes(), 4 << 20
def work(count):
    blocks = [bytearray(size) for _ in range(count)]
    for block in blocks:
        block[::4096] = bytes(len(block[::4096]))
    return blocks[::8]  # what is freed between these is holes
print(holes.after_work(in_use_bytes("cpu")))
kept = work(128)
before = in_use_bytes("cpu")
print(holes.after_work(before), before, in_use_bytes("cpu"))
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_holes_between_blocks_in_use_go_back_to_the_system() -> None:
    clean = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run([sys.executable, "-c", HOLES], env=clean, capture_output=True, text=True, timeout=120, check=True)
    first, second, before, after = done.stdout.split()
    assert (first, second) == ("False", "True")
    assert int(before) - int(after) > 300 << 20, "of 512 MB, 64 are in use"


def test_what_work_needs_is_learned_behind_a_return() -> None:
    holes = Holes()
    sizes = (100, 124, 126, 160, 161, 199, 201, 200, 249)  # behind the returns at 126 and 201, 160 and 200 are what work needs
    assert [holes.after_work(size << 20) for size in sizes] == [False, False, True, False, False, False, True, False, False]


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_blocks_are_used_again_unless_the_user_has_set_otherwise() -> None:
    kept, with_setting = faults()
    refused, without = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept and not refused
    assert with_setting < 100, with_setting
    assert without > 5 * 100, without
