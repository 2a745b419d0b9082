"""All measurements that need a GPU, in one command and within 9 minutes on one H200, without Ray or network.

    PYTHONPATH=kernels:. python -m benchmarks.gpu_suite --out results.json      from the root of a checkout, nothing installed
    PYTHONPATH=kernels:. python -m benchmarks.gpu_suite --only kernels --only head --out results.json
    PYTHONPATH=kernels:. python -m benchmarks.gpu_suite --tiny --out results.json    checks the script in a minute
    PYTHONPATH=kernels:. python -m benchmarks.gpu_suite --markdown results.json

Sections, most important first (benchmarks/gpu_*.py):

    kernels       the Triton kernels against float64, forward and backward
    attention     FlexAttention against the dense mask
    waits         where the host waits for the GPU in a training step
    loader        batches that forked processes build, against those of the thread
    engine        training steps of 1B and 8B LoRA through DeepSpeed: tokens a second, MFU, memory
    head          head operations against torch, compiled torch and the bare matrix products
    fused         fused RMSNorm, SwiGLU and RoPE against transformers' layers
    memory        the peak of a step beside the plan's
    compilations  graphs that torch.compile makes over micro-batches of varying lengths
    peers         training steps against those of other trainers

Needs torch >= 2.11, triton, transformers >= 5.17, peft, numpy and safetensors. engine, waits and memory also need pydantic and
pyarrow, and deepspeed for the rows of DeepSpeed; fused needs liger-kernel. A row whose package is missing says "not measured".
A row that fails gives its reason, and the next one runs. Each section has its part of the time, and what it leaves goes to those
after it; a row that would not fit is skipped. The file is written after every row, so a run that is killed keeps what it has
measured. Without a GPU, tiny shapes run on the CPU.
"""

import importlib
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks import gpu_tables, results
from benchmarks.gpu_rows import Place, Row, Suite

BUDGET_SECONDS = 520
SECTION_SHARE = 240.0 / 520.0  # of the budget, at most, so that a section alone takes 4 minutes
# Section -> its module, imported when it runs, and the seconds that it is expected to need on an H200 (not measured yet).
SECTIONS: dict[str, tuple[str, float]] = {
    "kernels": ("benchmarks.gpu_kernels", 30.0),
    "attention": ("benchmarks.gpu_attention", 35.0),
    "waits": ("benchmarks.gpu_waits", 45.0),
    "loader": ("benchmarks.gpu_loader", 10.0),
    "engine": ("benchmarks.gpu_engine", 110.0),
    "head": ("benchmarks.gpu_heads", 70.0),
    "fused": ("benchmarks.gpu_fused", 20.0),
    "memory": ("benchmarks.gpu_memory", 65.0),
    "compilations": ("benchmarks.gpu_compilations", 40.0),
    "peers": ("benchmarks.gpu_peers", 95.0),
}


def time_limit(left: float, section: str, remaining: Sequence[str], *, budget: float) -> float:
    """Seconds of `section` when `left` of the `budget` are to be shared by the `remaining` sections, itself included."""
    share = SECTIONS[section][1] / sum(SECTIONS[name][1] for name in remaining)
    return min(SECTION_SHARE * budget, left * share)


def run(suite: Suite, names: Sequence[str], *, budget: float) -> None:
    """Runs these sections one after another."""
    end = time.perf_counter() + budget
    for number, name in enumerate(names):
        limit = time_limit(end - time.perf_counter(), name, names[number:], budget=budget)
        suite.section(name, limit, lambda suite, name=name: importlib.import_module(SECTIONS[name][0]).run(suite))  # type: ignore[misc]


def parser() -> Any:
    """The command line."""
    found = results.parser_of(__doc__)
    found.add_argument("--only", choices=SECTIONS, action="append", metavar="SECTION", help="this section; may be repeated")
    found.add_argument("--tiny", action="store_true", help="shapes that take seconds and check the script")
    found.add_argument("--device", choices=("cpu", "cuda:0"), help="default: the GPU if there is one")
    found.add_argument(
        "--budget", type=results.positive, default=BUDGET_SECONDS, help="seconds; rows that would not fit are skipped"
    )
    found.add_argument("--repeats", type=results.positive, default=5, help="timed steps of a row")
    found.add_argument("--commit", help="the commit to report if the tree is not a checkout")
    return found


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    commands = parser()
    given = commands.parse_args(words)
    if results.rendered(commands, given, gpu_tables.report):
        return
    device = given.device or ("cuda:0" if torch.cuda.is_available() else "cpu")
    if device != "cpu" and not torch.cuda.is_available():
        commands.error("--device cuda:0: torch sees no GPU; leave it out to run tiny shapes on the CPU")
    place = Place(device, tiny=given.tiny or device == "cpu")
    about = results.facts(results.command_of("benchmarks.gpu_suite", words), device=device, tiny=place.tiny)
    result: Row = {**about, "commit": about["commit"] or given.commit, "finished": False, "rows": []}

    def write(rows: list[Row]) -> None:
        result["rows"] = rows
        if given.out:
            results.write(given.out, result)

    suite = Suite(place, seconds=given.budget, repeats=given.repeats, write=write)
    run(suite, [name for name in SECTIONS if name in (given.only or SECTIONS)], budget=given.budget)
    result["rows"], result["finished"] = suite.rows, True
    results.conclude(result, gpu_tables.report, given.out)


if __name__ == "__main__":
    main()
