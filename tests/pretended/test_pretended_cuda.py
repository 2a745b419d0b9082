"""Runs cases.py and transfers.py in a process of their own: Triton's interpreter is chosen when the kernels are imported.

What they print, the waits of every method by file and line, is shown with `pytest -s`.
"""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(("name", "least"), [("transfers", 20), ("cases", 28)])
def test_nothing_mixes_devices_and_the_host_waits_once_a_step(name: str, least: int) -> None:
    run(name, "not slow", least)


@pytest.mark.slow
def test_nor_in_the_cases_that_are_left() -> None:
    run("cases", "slow", 7)


def run(name: str, chosen: str, least: int) -> None:
    """Runs the tests of a file that the marker expression `chosen` selects; at least `least` must pass."""
    command = [sys.executable, "-m", "pytest", "-q", "-rP", "-p", "no:cacheprovider", "-m", chosen, f"tests/pretended/{name}.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    print(done.stdout)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= least, done.stdout
