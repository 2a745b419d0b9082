"""The fused layers of model.fused_layers=liger: results in Triton's interpreter, and their kernels compiled for GPUs.

Each in a process of its own, since the interpreter is chosen when kernels are imported. Costs two minutes on a busy core.
"""

import json
import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # a block's limit by compute capability; CUDA C++ programming guide

pytestmark = pytest.mark.skipif(find_spec("liger_kernel") is None, reason="needs liger-kernel: pip install 'rec-dist[liger]'")


def run(command: list[str], **environment: str) -> str:
    inherited = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    whole = {**inherited, **environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=whole, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-20_000:] + done.stderr[-4_000:]
    return done.stdout


@pytest.mark.slow
def test_layers_agree_with_float64_truth_in_the_interpreter() -> None:
    command = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/triton/interpreted_layers.py"]
    passed = re.search(r"(\d+) passed", run(command, TRITON_INTERPRET="1"))
    assert passed is not None
    assert int(passed[1]) >= 60


def test_their_kernels_compile(tmp_path: Path) -> None:
    check_compiled(90, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("chip", [80, 100])
def test_their_kernels_compile_for_other_chips(chip: int, tmp_path: Path) -> None:
    check_compiled(chip, tmp_path)


def check_compiled(chip: int, tmp_path: Path) -> None:
    """Nothing spills but the backward pass of GEGLU, for which Liger has 16 warps work on one row: 48 bytes a thread."""
    command = ["tests/triton/compile_layers.py", str(chip)]
    found = json.loads(run(command, TRITON_CACHE_DIR=str(tmp_path)))
    assert len(found) == 18
    for entry in found:
        assert entry["STACK"] <= (64 if entry["kernel"] == "geglu backward" else 0), f"registers spill: {entry}"
        assert entry["LOCAL"] == 0, entry
        assert 0 < entry["REG"] <= 255, entry
        assert max(entry["shared"], entry["SHARED"]) <= SHARED_BYTES[entry["chip"]], entry
