"""A model of three billion parameters: three LoRA steps of S-DPO on two ZeRO-3 workers, within 20 GB, without a GPU.

    python -m benchmarks.three_billion --out three_billion.json     needs 17 GB of free memory, 7 GB of disk, about 10 minutes
    python -m benchmarks.three_billion --size 300M                  the same with a tenth of the parameters
    python -m benchmarks.three_billion --markdown three_billion.json

The model is a Llama of 30 layers of width 3072 with random weights: 12 GB in float32, in which CPUs train, and 6 GB on disk
in bfloat16. Micro-batches have a few dozen tokens. The benchmark therefore measures how weights, gathered layers and
optimizer are held, and that weights are read into shards: no process may ever hold the whole model. The limit on live
parameters is so low that a layer is gathered just before its use. Memory is each process's own (anonymous pages), read 50
times a second from its start to its end. The tables also show the most resident pages, which count mapped weight files too,
and what `rec-dist plan` says a rank needs.
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
# Bytes of a worker: before it has a model; its own peak; the resident peaks, which include pages of mapped files.
_COLUMNS = ("before_model", "private", "resident_loading", "resident_training")


def measure(size: str, folder: Path) -> dict[str, Any]:
    """The run and its plan."""
    shape = SHAPES[size]
    inputs = make_inputs(folder, shape, dtype=torch.bfloat16)
    config = {
        **inputs,
        "prompt": {**inputs["prompt"], "max_history": 2},
        "negatives": {"num": 1},
        "task": {"kind": "sdpo", "reference": "cached"},
        "train": {"run_dir": str(folder / "run"), "max_steps": 3, "global_batch_size": WORKERS, "max_tokens_per_micro_batch": 64},
        "cluster": {**inputs["cluster"], "zero_stage": 3, "max_live_parameters": 50_000_000},
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
            dict(zip(_COLUMNS, values, strict=True))
            for values in zip(
                done["before_model_bytes"],
                done["private_bytes"],
                done["peak_loading_bytes"],
                done["peak_memory_bytes"],
                strict=True,
            )
        ],
        "together": done["private_together_bytes"],
        "predicted": {**parts, "total": sum(value for part, value in parts.items() if part != "fragmentation")},
        "seconds": done["seconds"],
        "steps": [
            {key: row[key] for key in ("step", "loss", "grad_norm", "tokens", "step_seconds")} for row in step_rows(config)
        ],
    }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The workers beside the prediction, their sum, and the steps."""
    whole, plan = result["float32_bytes"], result["predicted"]
    workers = result["workers"]
    planned = {**dict.fromkeys(_COLUMNS, 0), "before_model": plan["reserved"], "private": plan["total"]}
    columns = {
        **{f"rank {rank}": worker for rank, worker in enumerate(workers)},
        "sum": {key: sum(worker[key] for worker in workers) for key in _COLUMNS},
        "planned for a rank": planned,
    }
    rows = [
        {"GB": name, **{key: f"{value / 1e9:.2f}" if value else "" for key, value in column.items()}}
        for name, column in columns.items()
    ]
    steps = [
        {key: value if isinstance(value, int) else f"{value:.4g}" for key, value in step.items()} for step in result["steps"]
    ]
    most, together = max(worker["private"] for worker in workers), result["together"]
    verdict = "met" if together <= LIMIT_BYTES else "NOT met"
    lines = [
        f"{result['weights']:,} weights, {whole / 1e9:.2f} GB in float32, {WORKERS} workers, ZeRO-3; {result['seconds']:.0f} s",
        results.table(rows, markdown=markdown),
        "",
        results.table(steps, markdown=markdown),
        "",
        f"most at one instant, loading included: {together / 1e9:.2f} GB together, limit {LIMIT_BYTES / 1e9:.0f} GB: {verdict}; "
        f"{most / 1e9:.2f} GB in one process, {most / whole:.2f} of the model",
        f"planned parts, GB: {', '.join(f'{part} {value / 1e9:.2f}' for part, value in plan.items() if value >= 5e6)}",
    ]
    return "\n".join([*lines, results.stamp(result)] if "machine" in result else lines)


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints tables, writes a file."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--size", choices=SHAPES, default="3B")
    parser.add_argument("--folder", type=Path, help="where the weights are written; removed after the run")
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        return
    needed = 1.4 * 4 * SHAPES[given.size].num_weights
    free = psutil.virtual_memory().available
    if free < needed:
        parser.error(
            f"--size {given.size} needs {needed / 1e9:.0f} GB of free memory, but only {free / 1e9:.0f} GB are free; "
            "end other programs"
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
