"""Compares what `rec-dist plan` predicts with whole runs on this machine's CPUs: memory of a worker and time of a step.

    python -m benchmarks.plan_memory --out plan_memory.json
    python -m benchmarks.plan_memory --sizes 25M 300M --stages 3 --workers 2
    python -m benchmarks.plan_memory --markdown plan_memory.json

It trains S-DPO with LoRA r8 on models of random float32 weights, a few steps each, in every combination of size, ZeRO stage
and workers. Measured memory: the most resident memory of a worker from the first forward pass on (VmHWM), minus that of a
worker with an almost empty model (Python, its libraries, tokenizer, data). Predicted: the plan's parts except `reserved`,
which stands for that base, and the margin, which is for GPU allocators. Time: the median step over that of the first row,
both measured and predicted, so that the speed of the machine cancels. Cost: about 10 minutes on 2 idle cores; 8 GB of memory
for 300M at stage 0 on two workers.
"""

import itertools
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peer_methods import Shape
from benchmarks.whole_runs import SHAPES, make_inputs, predicted, step_rows, train

GROUPS, MAX_TOKENS = 24, 1024  # two micro-batches, almost full, on one worker and on two
NOTHING = Shape(64, 1, 2, 2, 128, 8192)
_NOT_TORCH = ("fragmentation", "reserved")


def one(
    inputs: dict[str, Any], folder: Path, *, stage: int, workers: int, steps: int, reference: str = "online"
) -> dict[str, Any]:
    """A run and its plan."""
    run_dir = folder / f"zero{stage}-{workers}"
    config = {
        **inputs,
        "prompt": {**inputs["prompt"], "max_history": 10},
        "negatives": {"num": 3},
        "task": {"kind": "sdpo", "reference": reference},
        "train": {
            "run_dir": str(run_dir),
            "max_steps": steps,
            "global_batch_size": GROUPS,
            "max_tokens_per_micro_batch": MAX_TOKENS,
        },
        "cluster": {**inputs["cluster"], "zero_stage": stage},
        "checkpoint": {"every_steps": 1000},
    }
    done = train(config, workers=workers, log=folder / f"{run_dir.name}.log")
    rows = step_rows(config)
    groups, tokens = (statistics.mean(row[key] for row in rows) for key in ("groups", "tokens"))
    # The plan gets the measured lengths, so that it describes the micro-batches of the run.
    config["plan"] = {**inputs["plan"], **lengths(tokens / groups, negatives=3)}
    plan = predicted(config, workers=workers)
    expected = sum(value for part, value in plan["memory"]["parts"].items() if part not in _NOT_TORCH)
    shutil.rmtree(run_dir)
    return {
        "stage": stage,
        "workers": workers,
        "predicted_bytes": expected,
        "resident_bytes": max(done["peak_memory_bytes"]),
        "parts": plan["memory"]["parts"],
        "loading_bytes": max(done["peak_loading_bytes"]),
        "predicted_seconds": plan["step"]["seconds"],
        "measured_seconds": statistics.median(row["step_seconds"] for row in rows[1:]),
        "tokens_per_step": tokens,
    }


def lengths(tokens_per_group: float, *, negatives: int) -> dict[str, float]:
    """plan.prompt_tokens and plan.completion_tokens for groups of that many rows. Titles of these data have about 5 tokens."""
    completion = 6.0
    return {"prompt_tokens": tokens_per_group - (negatives + 1) * (completion - 1), "completion_tokens": completion}


def run(sizes: list[str], stages: list[int], workers: list[int], *, steps: int, reference: str) -> list[dict[str, Any]]:
    """A row for each combination."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="plan-memory-") as place:
        empty = one(make_inputs(Path(place), NOTHING), Path(place), stage=0, workers=1, steps=2)
    base = empty["resident_bytes"] - empty["predicted_bytes"]
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="plan-memory-") as place:
            folder = Path(place)
            inputs = make_inputs(folder, SHAPES[size])
            for stage, count in itertools.product(stages, workers):
                ran = one(inputs, folder, stage=stage, workers=count, steps=steps, reference=reference)
                row = {"size": size, "base_bytes": base, **ran}
                row["measured_bytes"] = row["resident_bytes"] - base
                print(report({"rows": [row]}), file=sys.stderr)
                rows.append(row)
    return rows


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """One line for each run."""
    rows, first = result["rows"], result["rows"][0]
    shown = [
        {
            "size": row["size"],
            "ZeRO": str(row["stage"]),
            "workers": str(row["workers"]),
            "predicted MB": f"{row['predicted_bytes'] / 1e6:,.0f}",
            "measured MB": f"{row['measured_bytes'] / 1e6:,.0f}",
            "predicted / measured": f"{row['predicted_bytes'] / row['measured_bytes']:.2f}",
            "step, predicted": f"{row['predicted_seconds'] / first['predicted_seconds']:.2f} x",
            "step, measured": f"{row['measured_seconds'] / first['measured_seconds']:.2f} x",
        }
        for row in rows
    ]
    text = f"{results.table(shown, markdown=markdown)}\n\na worker without a model takes {first['base_bytes'] / 1e6:,.0f} MB"
    return f"{text}\n\n{results.stamp(result)}" if "machine" in result else text


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table, writes a file."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["25M", "135M", "300M"])
    parser.add_argument("--stages", nargs="+", type=int, default=[0, 2, 3])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--reference", choices=["online", "cached"], default="online")
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        return
    words = sys.argv[1:] if arguments is None else arguments
    rows = run(given.sizes, given.stages, given.workers, steps=given.steps, reference=given.reference)
    results.conclude(results.facts(results.command_of("benchmarks.plan_memory", words), rows=rows), report, given.out)


if __name__ == "__main__":
    main()
