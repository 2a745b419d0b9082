"""Whether a worker's memory levels off: LoRA steps of a small random Llama over micro-batches of 500 to 4,000 rows, one by one.

    python -m benchmarks.memory_growth --out memory_growth.json --figure docs/figures/memory-growth.svg
    python -m benchmarks.memory_growth --steps 300 --dtype float32
    python -m benchmarks.memory_growth --markdown memory_growth.json

Workers keep what they free (runtime/allocator.py), since pages that the system hands out anew cost time. Micro-batches of many
lengths leave holes that the next ones do not fit into, so kept memory may grow without need. This measures resident memory after
each step in a process of its own, with the settings of a worker: holes given back (runtime/allocator.py: Holes) and, to compare,
kept. It exits with code 1 if with the first the most of the last third exceeds the most of the second third by more than 5 %.
Cost: about 1 s of one core a step and way.
"""

import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from rec_dist.models.precision import choose_on_cpu

SHORTEST, LONGEST = 500, 4000  # rows of a micro-batch
LAYERS = 4
_TOLERANCE = 1.05


def worker(dtype: str, steps: int, returns: bool) -> None:
    """Trains, and prints a JSON line a step: rows, resident bytes after it, whether holes were returned, seconds."""
    import torch

    from benchmarks.peer_methods import Shape, llama_config
    from rec_dist.models.language import LoraSpec, add_lora
    from rec_dist.models.per_prompt import PER_PROMPT, register
    from rec_dist.models.scorer import Scorer
    from rec_dist.runtime.allocator import Holes, keep_freed_memory
    from rec_dist.runtime.quiet import quieten
    from rec_dist.training.memory import in_use_bytes

    quieten()
    assert keep_freed_memory(), "unset MALLOC_MMAP_MAX_, MALLOC_TRIM_THRESHOLD_ and MALLOC_TOP_PAD_; glibc is needed"
    register()
    torch.manual_seed(0)
    from transformers import AutoModelForCausalLM

    config = llama_config(Shape(256, LAYERS, 4, 2, 688, 8192))
    config._attn_implementation = PER_PROMPT
    model = AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    model = add_lora(model, LoraSpec(8, 16.0, 0.0, "all-linear"), seed=0, weights=None, keep_reference=False, float32=True)
    scorer = Scorer(model, lambda logps, batch: (logps.sum(), logps.new_ones(()), {}), ()).train()
    optimizer = torch.optim.AdamW([weight for weight in scorer.parameters() if weight.requires_grad], lr=1e-4)
    rng, holes = np.random.default_rng(0), Holes()
    for _ in range(steps):
        began, work = time.perf_counter(), time.process_time()
        batch = micro_batch(rng, int(rng.integers(SHORTEST, LONGEST + 1)))
        scorer(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()
        held = in_use_bytes("cpu")
        row = {"rows": batch.num_tokens, "bytes": held, "returned": returns and holes.after_work(held)}
        seconds = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - work}
        print(json.dumps({**row, **seconds}), flush=True)


def micro_batch(rng: np.random.Generator, rows: int) -> Any:
    """Prompts of 40 to 600 tokens with 4 completions each, until they have about that many rows."""
    from rec_dist.packing.grouped_prompt import GroupedPrompt
    from rec_dist.packing.packed_batch import pack_prompts

    prompts: list[GroupedPrompt] = []
    while sum(prompt.num_tokens for prompt in prompts) < rows:
        length, answers = int(rng.integers(40, 600)), rng.integers(2, 12, size=4).astype(np.int32)
        tokens = rng.integers(1, 8192, size=length + int(answers.sum())).astype(np.int32)
        targets = tokens[length:]
        ends = np.cumsum(answers)
        prompts.append(
            GroupedPrompt(
                tokens=tokens[:length],
                branch_points=np.asarray([length - 1], dtype=np.int32),
                keys=np.asarray([len(prompts)], dtype=np.int64),
                group_sizes=np.asarray([4], dtype=np.int32),
                completion_inputs=np.delete(targets, ends - 1),
                input_lengths=answers - 1,
                lengths=answers,
                targets=targets,
            )
        )
    return pack_prompts(prompts)


def measure(dtype: str, steps: int, *, returns: bool) -> dict[str, Any]:
    """The steps of a worker, in a process of its own with the settings of a worker."""
    line = [sys.executable, "-m", "benchmarks.memory_growth", "worker", dtype, str(steps), str(int(returns))]
    kept = {name: value for name, value in os.environ.items() if not name.startswith("MALLOC_")}
    done = subprocess.run(line, stdout=subprocess.PIPE, text=True, check=True, env={"OMP_NUM_THREADS": "1", **kept})
    rows = [json.loads(text) for text in done.stdout.split("\n")[:-1]]
    thirds = [max(row["bytes"] for row in part) for part in np.array_split(np.asarray(rows, dtype=object), 3)]
    return {
        "holes": "returned" if returns else "kept",
        "dtype": dtype,
        "most_bytes": thirds,
        "returns": sum(row["returned"] for row in rows),
        "cpu_seconds": sum(row["cpu_seconds"] for row in rows[1:]),
        "steps": rows,
    }


def has_levelled_off(most_bytes: Sequence[float]) -> bool:
    """most_bytes: the most resident memory in each third of the steps.

    >>> has_levelled_off([0.5, 1.0, 1.04]), has_levelled_off([0.5, 1.0, 1.2])
    (True, False)
    """
    return most_bytes[2] <= _TOLERANCE * most_bytes[1]


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """A row for each way: the most memory in each third of the steps, and what returning it cost."""
    rows = [
        {
            "holes are": row["holes"],
            "dtype": row["dtype"],
            **{f"GB, third {third + 1}": row["most_bytes"][third] / 1e9 for third in range(3)},
            "levelled off": "yes" if has_levelled_off(row["most_bytes"]) else "no",
            "returns": row["returns"],
            "CPU seconds": row["cpu_seconds"],
        }
        for row in result["rows"]
    ]
    return f"{results.table(rows, markdown=markdown)}\n\n{results.stamp(result)}"


def draw(result: dict[str, Any], path: Path) -> None:
    """Resident memory by step, a line for each way, as an SVG of 640 x 320."""
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    figure = Figure(figsize=(6.4, 3.2), layout="constrained")
    axes = figure.add_subplot()
    for row in result["rows"]:
        axes.plot([step["bytes"] / 1e9 for step in row["steps"]], label=f"holes {row['holes']}", linewidth=1.2)
    axes.set_xlabel("step")
    axes.set_ylabel("resident memory, GB")
    axes.set_ylim(bottom=0)
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    FigureCanvasSVG(figure).print_svg(path, metadata={"Date": None})


def main(arguments: list[str] | None = None) -> int:
    """The command line. Returns 1 if memory that workers hold as they are set has not levelled off."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--steps", type=results.positive, default=200, help="steps, at least 30 (default: %(default)s)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="default: what model.dtype=auto takes on this CPU")
    parser.add_argument("--figure", type=Path, help="SVG of memory by step")
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        if given.figure is not None:
            draw(results.read_result(given.markdown), given.figure)
        return 0
    if given.steps < 30:
        parser.error("--steps must be 30 or more: a third of them is compared with a third")
    dtype = given.dtype or choose_on_cpu().dtype
    words = sys.argv[1:] if arguments is None else arguments
    rows = [measure(dtype, given.steps, returns=returns) for returns in (True, False)]
    result = results.facts(results.command_of("benchmarks.memory_growth", words), rows=rows)
    results.conclude(result, report, given.out)
    if given.figure is not None:
        draw(result, given.figure)
    return int(not has_levelled_off(rows[0]["most_bytes"]))


if __name__ == "__main__":
    if sys.argv[1:2] == ["worker"]:
        worker(sys.argv[2], int(sys.argv[3]), sys.argv[4] == "1")
    else:
        sys.exit(main())
