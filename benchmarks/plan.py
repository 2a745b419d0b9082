"""Compares the compute times that `rec-dist plan` predicts for token budgets with those of a CPU, as ratios, on one core.

    python -m benchmarks.plan --out plan.json

One micro-batch of G groups, forward and backward, of S-DPO with LoRA r8 and a dense mask. Both columns are seconds a group,
divided by those of the first row, so that the speed of the machine cancels. Measured: the least CPU seconds of the process
over all repeats, since other load disturbs them less than wall-clock time. Cost: about a minute.
"""

import argparse
import json
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import results
from benchmarks.peer_methods import Shape, build, build_model
from benchmarks.peer_targets import Point
from rec_dist.models.known_decoders import Architecture, Parameters
from rec_dist.models.size import count_weights
from rec_dist.plan.step import compute_flops
from rec_dist.plan.workload import MicroBatches, Workload
from rec_dist.sizing.memory import Setup
from rec_dist.sizing.shares import Zero

SHAPE = Shape(layers=6, vocab=8192)  # a fifth of SmolLM2-135M's layers
PROMPT, COMPLETION, NEGATIVES = 100, 8, 3


def predicted_flops(scorer: Any, shape: Shape, groups: int, rows: int) -> float:
    """The FLOP of one micro-batch of `groups` groups by the plan's formula."""
    work = count_weights(scorer)
    assert work is not None
    head = shape.hidden // shape.heads
    setup = Setup(
        shape=Architecture(
            shape.hidden, shape.intermediate, shape.layers, shape.heads, shape.kv_heads, head, shape.vocab, max_positions=None
        ),
        parameters=Parameters((), (), work.head, tied=shape.tied, adapted=0, work=work),
        zero=Zero(0),
        workers=1,
        element=4,
        max_tokens=rows,
        attention="sdpa",
        checkpointing=False,
        rank=8,
        on_gpu=False,
    )
    workload = Workload(groups=groups, targets=1, negatives=NEGATIVES, prompt=PROMPT, completion=COMPLETION)
    assert workload.rows * groups == rows, "the plan counts other rows than the batch has"
    return compute_flops(setup, work, MicroBatches(1, float(rows), float(groups), 1.0), workload)[1]


def run(counts: list[int], *, repeats: int, shape: Shape = SHAPE) -> list[dict[str, Any]]:
    """A row for each number of groups in a micro-batch."""
    torch.set_num_threads(1)
    methods: list[Any] = []
    for groups in counts:
        model = build_model(shape)
        methods.append(build("d", model, Point(PROMPT, COMPLETION, NEGATIVES, groups), shape.vocab))
    best = [float("inf")] * len(counts)
    for repeat in range(repeats + 1):  # interleaved; the first round warms up
        for place, method in enumerate(methods):
            began = time.process_time()
            method.step()
            if repeat:
                best[place] = min(best[place], time.process_time() - began)
    rows = []
    for groups, method, seconds in zip(counts, methods, best, strict=True):
        flops = predicted_flops(method.scorer, shape, groups, method.num_tokens)
        rows.append({"groups": groups, "tokens a micro-batch": method.num_tokens, "flops": flops, "seconds": seconds})
    first = rows[0]
    for row in rows:
        row["predicted"] = (row["flops"] / row["groups"]) / (first["flops"] / first["groups"])
        row["measured"] = (row["seconds"] / row["groups"]) / (first["seconds"] / first["groups"])
    return rows


def main(arguments: list[str] | None = None) -> None:
    """Measures, prints a table, writes a file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--groups", type=json.loads, default=[2, 8, 16, 32], help="groups a micro-batch, as a JSON list")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args(arguments)
    rows = run(options.groups, repeats=options.repeats)
    print(results.table([{**row, "flops": f"{row['flops']:.3g}"} for row in rows]))
    if options.out is not None:
        words = [] if arguments is None else arguments
        results.write(options.out, {**results.facts(results.command_of("benchmarks.plan", words)), "rows": rows})


if __name__ == "__main__":
    main()
