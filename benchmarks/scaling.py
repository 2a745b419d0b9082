"""Strong scaling on this machine's CPUs: the same global steps on 1, 2 and 4 ZeRO-3 workers of one thread each.

    python -m benchmarks.scaling --out scaling.json
    python -m benchmarks.scaling --sizes 25M --workers 1 2 --steps 6
    python -m benchmarks.scaling --markdown scaling.json

It trains S-DPO with LoRA r8 on a model of random float32 weights, four micro-batches a step, with gloo over loopback; whole
runs go through the trainer's own worker. "of ideal" is tokens/s over those of one worker times the cores that the workers can
use: on two cores, four workers are at best as fast as two. Steps must have the same losses for any number of workers, or
nothing is printed. Cost: about 12 minutes on 2 idle cores.
"""

import os
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.whole_runs import SHAPES, make_inputs, step_rows, train

GROUPS, MAX_TOKENS, STAGE = 48, 1024, 3  # about four micro-batches: one for each of four workers
_SAME_LOSS = 1e-4


def one(inputs: dict[str, Any], folder: Path, *, workers: int, steps: int) -> dict[str, Any]:
    """A run on `workers` workers: seconds and tokens of its steps except the first, and every loss."""
    run_dir = folder / f"workers-{workers}"
    config = {
        **inputs,
        "prompt": {**inputs["prompt"], "max_history": 10},
        "negatives": {"num": 3},
        "task": {"kind": "sdpo", "reference": "online"},
        "train": {
            "run_dir": str(run_dir),
            "max_steps": steps,
            "global_batch_size": GROUPS,
            "max_tokens_per_micro_batch": MAX_TOKENS,
        },
        "cluster": {**inputs["cluster"], "zero_stage": STAGE},
        "checkpoint": {"every_steps": 1000},
    }
    train(config, workers=workers, log=folder / f"{run_dir.name}.log", exact=False)
    rows = step_rows(config)
    return {
        "workers": workers,
        "losses": [row["loss"] for row in rows],
        "tokens_per_step": statistics.mean(row["tokens"] for row in rows[1:]),
        "seconds": results.spread([row["step_seconds"] for row in rows[1:]]),
    }


def run(sizes: list[str], workers: list[int], *, steps: int) -> list[dict[str, Any]]:
    """A row for each size and number of workers."""
    rows = []
    for size in sizes:
        with tempfile.TemporaryDirectory(prefix="scaling-") as place:
            inputs = make_inputs(Path(place), SHAPES[size])
            found = [{"size": size, **one(inputs, Path(place), workers=count, steps=steps)} for count in workers]
        check_same(found)
        rows += found
    return rows


def check_same(rows: list[dict[str, Any]]) -> None:
    """Raises SystemExit if the runs' losses differ."""
    for row in rows[1:]:
        apart = max(abs(ours - theirs) for ours, theirs in zip(row["losses"], rows[0]["losses"], strict=True))
        if not apart <= _SAME_LOSS:
            raise SystemExit(
                f"error: the losses of {row['workers']} workers differ by {apart:.2g} from those of {rows[0]['workers']}"
            )


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """One line for each run."""
    rate = lambda row: row["tokens_per_step"] / row["seconds"]["median"]
    shown = []
    for row in result["rows"]:
        first = next(other for other in result["rows"] if other["size"] == row["size"])
        usable = lambda which: min(which["workers"], result["cores"])
        shown.append(
            {
                "size": row["size"],
                "workers": str(row["workers"]),
                "seconds a step": "{median:.2f} [{low:.2f}, {high:.2f}]".format(**row["seconds"]),
                "tokens/s": f"{rate(row):,.0f}",
                "of ideal": f"{rate(row) / usable(row) / (rate(first) / usable(first)):.2f}",
            }
        )
    text = f"{results.table(shown, markdown=markdown)}\n\n{result['cores']} cores, ZeRO stage {STAGE}, {GROUPS} groups a step"
    return f"{text}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table, writes a file."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--sizes", nargs="+", choices=SHAPES, default=["25M", "135M"])
    parser.add_argument("--workers", nargs="+", type=int, default=[1, 2, 4])
    parser.add_argument("--steps", type=int, default=5)
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        return
    words = sys.argv[1:] if arguments is None else arguments
    cores = len(os.sched_getaffinity(0))
    rows = run(given.sizes, given.workers, steps=given.steps)
    results.conclude(results.facts(results.command_of("benchmarks.scaling", words), cores=cores, rows=rows), report, given.out)


if __name__ == "__main__":
    main()
