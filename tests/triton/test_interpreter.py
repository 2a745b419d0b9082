"""Runs interpreted.py in a process of its own: the interpreter is chosen when the kernels are imported, once a process."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    ("chosen", "at_least"), [("not slow", 100), pytest.param("slow", 1, marks=pytest.mark.slow)], ids=["quick", "thirty steps"]
)
def test_kernels_agree_with_float64_truth_in_the_interpreter(chosen: str, at_least: int) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", chosen, "tests/triton/interpreted.py"]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4_000:]
    passed = re.search(r"(\d+) passed", done.stdout)
    assert passed is not None
    assert int(passed[1]) >= at_least, done.stdout
