"""A model of three billion parameters: three LoRA steps of S-DPO on two ZeRO-3 workers, within 20 GB of a machine without GPUs.

    python -m benchmarks.three_billion --out three_billion.json     needs 21 GB of free memory, 7 GB of disk, about 10 minutes
    python -m benchmarks.three_billion --size 300M                  the same with a tenth of the parameters
    python -m benchmarks.three_billion --markdown three_billion.json

A Llama of 30 layers of width 3072 with random weights: 12 GB in the float32 that CPUs train in, 6 GB on disk in bfloat16. Packs have a
few dozen tokens, so what is measured is how weights, gathered layers and optimizer are held, and that they are read into shards: no
process may ever hold the whole model. Beside each worker's most resident memory stands what `rec-dist plan` says it needs.
"""

import shutil
import sys
import tempfile
from pathlib import Path
from typing import Any

import psutil
import torch

from benchmarks import results
from benchmarks.whole_runs import SHAPES, make_inputs, predicted, step_rows, train

WORKERS, LIMIT_BYTES = 2, 20e9


def measure(size: str, folder: Path) -> dict[str, Any]:
    """The run, and the plan of it."""
    shape = SHAPES[size]
    inputs = make_inputs(folder, shape, dtype=torch.bfloat16)
    config = {
        **inputs,
        "prompt": {**inputs["prompt"], "max_history": 2},
        "negatives": {"num": 1},
        "task": {"kind": "sdpo", "reference": "cached"},
        "train": {"run_dir": str(folder / "run"), "max_steps": 3, "groups_per_step": WORKERS, "tokens_per_pack": 64},
        "cluster": {**inputs["cluster"], "zero_stage": 3},
        "checkpoint": {"every_steps": 3, "keep": 1},
        "plan": {**inputs["plan"], "prompt_tokens": 20.0, "completion_tokens": 6.0},
    }
    done = train(config, workers=WORKERS, log=folder / "workers.log")
    parts = predicted(config, workers=WORKERS)["memory"]["parts"]
    return {
        "size": size,
        "weights": shape.num_weights,
        "float32_bytes": 4 * shape.num_weights,
        "workers": [
            {"before_model": before, "loading": loading, "training": training}
            for before, loading, training in zip(
                done["before_model_bytes"], done["peak_loading_bytes"], done["peak_memory_bytes"], strict=True
            )
        ],
        "predicted": {**parts, "total": sum(value for part, value in parts.items() if part != "fragmentation")},
        "seconds": done["seconds"],
        "steps": [
            {key: row[key] for key in ("step", "loss", "grad_norm", "tokens", "step_seconds")} for row in step_rows(config)
        ],
    }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The workers beside the prediction, the sum, and the steps."""
    whole, plan = result["float32_bytes"], result["predicted"]
    rows = [
        {"process": f"rank {rank}", **{f"{key}, GB": f"{value / 1e9:.2f}" for key, value in worker.items()}}
        for rank, worker in enumerate(result["workers"])
    ]
    rows.append(
        {"process": "together", **{key: f"{sum(float(row[key]) for row in rows):.2f}" for key in rows[0] if key != "process"}}
    )
    planned = {"process": "planned for a rank", "before_model, GB": f"{plan['reserved'] / 1e9:.2f}", "loading, GB": "-"}
    rows.append({**planned, "training, GB": f"{plan['total'] / 1e9:.2f}"})
    steps = [
        {key: value if isinstance(value, int) else f"{value:.4g}" for key, value in step.items()} for step in result["steps"]
    ]
    together = sum(worker["training"] for worker in result["workers"])
    verdict = "met" if together <= LIMIT_BYTES else "NOT met"
    lines = [
        f"{result['weights']:,} weights, {whole / 1e9:.2f} GB in float32, {WORKERS} workers, ZeRO-3; {result['seconds']:.0f} s",
        results.table(rows, markdown=markdown),
        "",
        results.table(steps, markdown=markdown),
        "",
        f"together {together / 1e9:.2f} GB while training, limit {LIMIT_BYTES / 1e9:.0f} GB: {verdict}",
        f"planned parts, GB: {', '.join(f'{part} {value / 1e9:.2f}' for part, value in plan.items() if value >= 5e6)}",
    ]
    return "\n".join([*lines, results.stamp(result)] if "machine" in result else lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints tables, writes a file."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--size", choices=SHAPES, default="3B")
    parser.add_argument("--folder", type=Path, help="where the weights go for the run; removed after it")
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        return
    needed = 1.75 * 4 * SHAPES[given.size].num_weights
    free = psutil.virtual_memory().available
    if free < needed:
        parser.error(
            f"--size {given.size} needs {needed / 1e9:.0f} GB of free memory and {free / 1e9:.0f} GB are; end other programs"
        )
    if given.folder is not None:
        given.folder.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix="three-billion-", dir=given.folder))
    try:
        found = measure(given.size, folder)
    finally:
        shutil.rmtree(folder)
    words = sys.argv[1:] if arguments is None else arguments
    command = results.command_of("benchmarks.three_billion", words)
    results.conclude(results.facts(command, **found), report, given.out)


if __name__ == "__main__":
    main()
