"""Every kernel compiles for its chips without spilling registers, within shared memory, and with wide loads.

Costs 7 s for the 28 kernels of a chip and needs no GPU; one chip is quick, the others are slow tests. The test
reads what the assembler reports, which says nothing about a GPU's speed.
"""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[2]
SHARED_BYTES = {80: 163 << 10, 90: 227 << 10, 100: 227 << 10}  # a block's limit by compute capability; CUDA C++ programming guide


@pytest.fixture(scope="module", params=[90, pytest.param(80, marks=pytest.mark.slow), pytest.param(100, marks=pytest.mark.slow)])
def chip(request: pytest.FixtureRequest) -> int:
    """The compute capability times ten."""
    return int(request.param)


@pytest.fixture(scope="module")
def compiled(chip: int, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """Compiles in a process that does not interpret, with an empty cache, so that every kernel is compiled now."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path_factory.mktemp("triton-cache"))
    environment["PYTHONPATH"] = os.pathsep.join(filter(None, sys.path))
    command = [sys.executable, "tests/triton/compile_kernels.py", str(chip)]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4_000:]
    found: list[dict[str, Any]] = json.loads(done.stdout)
    return found


def test_all_kernels_are_compiled(compiled: list[dict[str, Any]]) -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "kernels" / "rec_dist_kernels").glob("triton_*.py")]
    kernels = {name for source in sources for name in re.findall(r"^def (\w+)_kernel\(", source, re.MULTILINE)}
    assert kernels == {entry["kernel"].split()[0] for entry in compiled}
    assert len(compiled) == 2 * 14


def test_no_kernel_spills_or_is_too_large(compiled: list[dict[str, Any]], chip: int) -> None:
    for entry in compiled:
        assert entry["chip"] == chip
        assert entry["STACK"] == entry["LOCAL"] == 0, f"registers spill: {entry}"
        assert 0 < entry["REG"] <= 255, entry
        assert max(entry["shared"], entry["SHARED"]) <= SHARED_BYTES[chip], entry


def test_logits_are_loaded_16_bytes_at_a_time(compiled: list[dict[str, Any]]) -> None:
    """A mask by the vocabulary instead of the padded row would make each load one word wide."""
    wide = [entry for entry in compiled if entry["kernel"].startswith(("token_logps", "logits_gradient", "scale"))]
    assert len(wide) == 2 * 5
    assert [entry for entry in wide if entry["wide_loads"] == 0] == []


def test_threads_meet_after_the_loop_over_the_vocabulary(compiled: list[dict[str, Any]]) -> None:
    """A barrier or a shuffle in it would stop every warp of a row once a block of logits."""
    loops = [entry["loop"] for entry in compiled if entry["kernel"].startswith("token_logps")]
    assert len(loops) == 2 * 2
    for loop in loops:
        assert loop["exponentials"] >= 16 * (1 + 1 / 8), loop  # of the 16 logits of a thread, and 2 or 4 that rescale its sums
        assert loop["barriers"] == loop["shuffles"] == 0, loop


def test_memory_and_not_arithmetic_bounds_a_pass_over_the_logits(compiled: list[dict[str, Any]]) -> None:
    """While an H200 reads a bfloat16 logit at 4.3 TB/s, it issues 13.8 instructions: 128 a clock, 132 processors, 1.76 GHz."""
    plain = [entry for entry in compiled if entry["kernel"] == "token_logps" and entry["dtype"] == "bf16"]
    assert len(plain) == 1
    for entry in plain:
        assert entry["loop"]["instructions"] / 16 <= 8, entry
