"""Freed memory is reused instead of fetched from the system a page at a time; what the user has set stays."""

import os
import subprocess
import sys

import pytest

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


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="glibc")
def test_blocks_are_used_again_unless_the_user_has_set_otherwise() -> None:
    kept, with_setting = faults()
    refused, without = faults(MALLOC_TRIM_THRESHOLD_="131072")
    assert kept and not refused
    assert with_setting < 100, with_setting
    assert without > 5 * 100, without
