"""What a checkpoint costs: how long training stands still for it, if it is written in the foreground or in the background.

    python -m benchmarks.checkpoint --out results.json         LoRA r8 and full fine-tuning, random weights, SmolLM2-135M's shape
    python -m benchmarks.checkpoint --markdown results.json

One process, ZeRO stage 0. It uses the project's own code: CheckpointManager.save, training steps, then
CheckpointManager.settle (checkpoint/manager.py). Foreground and background take turns on one engine. The stall is the time
inside save(). The cost is the time for save, for the steps until the checkpoint is committed and for the commit, minus the
time of as many plain steps. It therefore includes the processor time that background writing takes. Disk: three states of 12
bytes a trainable weight.
"""

import os
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks import results
from benchmarks.peer_arguments import shape_of
from benchmarks.peer_methods import Shape, build_model, prompt_of
from rec_dist.checkpoint.files import CheckpointMetadata
from rec_dist.checkpoint.manager import CheckpointManager, RetentionPolicy
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.engine.settings import EngineSettings
from rec_dist.methods.preference import sft
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.runtime.world import World

MODES = {"foreground": False, "background": True}


def make_engine(shape: Shape, *, lora: bool, tokens: int) -> tuple[Engine, PackedBatch]:
    """Returns an engine and a batch of about `tokens` rows for it."""
    method, device = sft(), "cuda:0" if torch.cuda.is_available() else "cpu"
    model = build_model(shape, lora=lora, device=device)
    module = Scorer(model, method.loss, method.metric_names)
    trained = [parameter for parameter in module.parameters() if parameter.requires_grad]
    settings = EngineSettings(zero_stage=0, bf16=False, max_grad_norm=1.0, hidden_size=shape.hidden)
    engine = Engine(module, settings, device=device, optimizer=torch.optim.AdamW(trained, lr=1e-5))
    engine.train_mode(True)
    drawn = torch.from_numpy(np.random.default_rng(0).integers(1, shape.vocab, tokens))
    return engine, pack_prompts([prompt_of(drawn[:-8], [tokens - 9], [drawn[None, -8:]], 0)])


def step(engine: Engine, batch: PackedBatch) -> None:
    """One complete forward pass, backward pass and optimizer step."""
    engine.backward(engine.forward(batch)[0] / tokens_of(batch), last=True)
    engine.step(1e-5)


def tokens_of(batch: PackedBatch) -> int:
    """The number of scored tokens."""
    return int(batch.targets.numel())


def one(checkpoints: CheckpointManager, engine: Engine, batch: PackedBatch, number: int, plain: float) -> dict[str, float]:
    """Saves one checkpoint and trains until it is committed."""
    start = time.perf_counter()
    checkpoints.save(engine, number, epoch=0)
    stall, steps = time.perf_counter() - start, 0
    while checkpoints.writing:
        step(engine, batch)
        steps += 1
    checkpoints.settle()
    return {"stall": stall, "cost": time.perf_counter() - start - steps * plain, "steps": steps}


def measure(shape: Shape, folder: Path, *, lora: bool, tokens: int, repeats: int) -> list[dict[str, Any]]:
    """Returns a row for each mode."""
    engine, batch = make_engine(shape, lora=lora, tokens=tokens)
    written: dict[str, list[float]] = {mode: [] for mode in MODES}
    found: dict[str, list[dict[str, float]]] = {mode: [] for mode in MODES}
    managers = {}
    for mode, asynchronous in MODES.items():
        retention = RetentionPolicy(keep=1, best=False, asynchronous=asynchronous, stop_on_fault=True)
        rows = written[mode]
        managers[mode] = CheckpointManager(
            folder / mode,
            World(),
            CheckpointMetadata(None, "benchmark", {}, {}),
            retention,
            zero_stage=0,
            log=print,
            record=lambda row, rows=rows: rows.append(row["write_seconds"]),  # type: ignore[misc]
            before_commit=lambda: None,
        )
    times = []
    for _ in range(repeats + 2):
        start = time.perf_counter()
        step(engine, batch)
        times.append(time.perf_counter() - start)
    plain = statistics.median(times[1:])
    for number in range(1, repeats + 2):
        for mode, checkpoints in managers.items():
            measured = one(checkpoints, engine, batch, number, plain)
            if number > 1:  # the first checkpoint allocates Adam's copies and meets a cold disk
                found[mode].append(measured)
    weights = sum(p.numel() for p in engine.module.parameters() if p.requires_grad)
    about = {"trains": "LoRA r8" if lora else "all weights", "weights": weights, "bytes": engine.num_state_bytes()}
    return [
        {
            **about,
            "mode": mode,
            "stall_seconds": results.spread([entry["stall"] for entry in found[mode]]),
            "cost_seconds": results.spread([entry["cost"] for entry in found[mode]]),
            "steps_meanwhile": statistics.median(entry["steps"] for entry in found[mode]),
            "write_seconds": results.spread(written[mode][1:]),
            "plain_step_seconds": plain,
        }
        for mode in MODES
    ]


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the table of a result."""
    rows = [
        {
            "trains": row["trains"],
            "state": f"{row['bytes'] / 1e6:,.0f} MB",
            "written in the": row["mode"],
            "stall, s": row["stall_seconds"]["median"],
            "lowest": row["stall_seconds"]["low"],
            "highest": row["stall_seconds"]["high"],
            "cost, s": row["cost_seconds"]["median"],
            "committed after, s": row["write_seconds"]["median"],
            "steps meanwhile": row["steps_meanwhile"],
            "a plain step, s": row["plain_step_seconds"],
        }
        for row in result["rows"]
    ]
    return "\n\n".join([results.table(rows, markdown=markdown), results.stamp(result)])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--tokens", type=int, default=256, help="tokens a step")
    parser.add_argument("--trains", choices=["lora", "full", "both"], default="both")
    parser.add_argument("--shape", type=shape_of, default={}, help="changes of the 135M model as JSON, such as '{\"layers\": 2}'")
    parser.add_argument("--folder", type=Path, help="where checkpoints are written (default: a temporary folder)")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    rows: list[dict[str, Any]] = []
    with process_group.joined(World(device="cuda:0" if torch.cuda.is_available() else "cpu")):
        for lora in {"lora": [True], "full": [False], "both": [True, False]}[given.trains]:
            with tempfile.TemporaryDirectory(dir=given.folder) as folder:
                shape = Shape(**given.shape)
                rows += measure(shape, Path(folder), lora=lora, tokens=given.tokens, repeats=given.repeats)
    result = {**results.facts(results.command_of("benchmarks.checkpoint", words)), "rows": rows}
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
