"""What it costs to resume: seconds from opening the data to the first batch, at group 1 and at group 10 million.

    python -m benchmarks.resume --out resume.json              synthetic, MovieLens-1M's size, 20 epochs of 563k groups
    python -m benchmarks.resume --markdown resume.json

Each repeat opens the data set anew (manifest, listing, catalogue, index, targets) and builds, packs and collates the step
that holds the group. Positions take turns, so that a slow stretch of the machine affects all alike. Titles are tokenised
once, before that. The target is that the last position costs as much as the first, within noise.
"""

import os
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch

from benchmarks import results
from benchmarks.loader import make_task, small_tokenizer, write_synthetic
from benchmarks.peer_targets import Verdict
from rec_dist.config.schema import DataConfig, PromptConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.prompts.builder import PromptBuilder, build_prompt_builder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.runtime.messages import messages_to
from rec_dist.runtime.world import World
from rec_dist.training.loader import prefetch, step_work

GLOBAL_BATCH_SIZE, MAX_TOKENS, NEGATIVES = 512, 8192, 15
POSITIONS = (1, 100_000, 10_000_000)
LIMIT = 1.1


def resume(path: str, cache: str, builder: PromptBuilder, position: int, *, window: int | None) -> dict[str, Any]:
    """Opens the data and builds the batches of the step that holds group `position` (counted from 1)."""
    began = time.perf_counter()
    data = PreparedData.open(path, cache=cache)
    split = data.split("train")
    task = make_task(data, split, builder, per_prompt_targets=1, groups=GLOBAL_BATCH_SIZE, kind="uniform", negatives=NEGATIVES)
    epochs = -(-max(POSITIONS) // task.sampler.num_examples) + 1
    task = replace(task, sampler=replace(task.sampler, epochs=epochs, window=window))
    opened = time.perf_counter()
    first = (position - 1) // GLOBAL_BATCH_SIZE
    assert first < task.sampler.num_steps, "the position lies beyond the last epoch"
    work = prefetch(
        lambda step: step_work(task, step, max_tokens=MAX_TOKENS, world=World()), range(first, task.sampler.num_steps)
    )
    step = next(work)
    done = time.perf_counter()
    work.close()
    return {
        "open": opened - began,
        "first_batch": done - opened,
        "total": done - began,
        "epoch": step.epoch,
        "tokens": step.num_tokens,
    }


def plan_only(position: int, *, num_examples: int, window: int | None) -> float:
    """Seconds to list the examples of one step, for any number of examples."""
    sampler = GlobalBatchSampler(num_examples, GLOBAL_BATCH_SIZE, 1, 0, window=window)
    began = time.perf_counter()
    sampler.examples_of_step((position - 1) // GLOBAL_BATCH_SIZE)
    return time.perf_counter() - began


def run(*, repeats: int, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Prepares the data in a temporary folder. Measures every position, with the whole epoch shuffled and in windows."""
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder) / "interactions.csv"
        write_synthetic(source, **(sizes or {}))
        config = DataConfig(source=str(source), path=f"{folder}/prepared", split="leave_one_out", min_rating=4.0)
        with messages_to(lambda line: print(line, file=sys.stderr)):
            prepare(config)
        cache = f"{folder}/cache"
        data = PreparedData.open(config.path, cache=cache)
        builder = build_prompt_builder(PromptConfig(), small_tokenizer(data.titles), data.titles)
        cases = [(position, window) for window in (None, 65_536) for position in POSITIONS]
        found: dict[tuple[int, int | None], list[dict[str, Any]]] = {case: [] for case in cases}
        resume(config.path, cache, builder, 1, window=None)
        for _ in range(repeats):
            for position, window in cases:
                found[position, window].append(resume(config.path, cache, builder, position, window=window))
        plans = [
            {"group": position, "examples": num_examples, "seconds": results.spread(times)}
            for num_examples in (10**7, 10**10)
            for position in (1, num_examples)
            if (times := [plan_only(position, num_examples=num_examples, window=None) for _ in range(repeats)])
        ]
        rows = [_row(position, window, found[position, window]) for position, window in cases]
        return {
            "rows": rows,
            "plans": plans,
            "users": len(data.split("train")),
            "examples": data.manifest.splits["train"].targets,
        }


def _row(position: int, window: int | None, runs: list[dict[str, Any]]) -> dict[str, Any]:
    times = {name: results.spread([run[name] for run in runs]) for name in ("open", "first_batch", "total")}
    return {"group": position, "window": window, "epoch": runs[0]["epoch"], "tokens": runs[0]["tokens"], **times}


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    rows = [
        {
            "resumes at group": f"{row['group']:,}",
            "epoch": row["epoch"] + 1,
            "shuffle window": f"{row['window']:,}" if row["window"] else "epoch",
            "open ms": row["open"]["median"] * 1e3,
            "first batch ms": row["first_batch"]["median"] * 1e3,
            "total ms": row["total"]["median"] * 1e3,
            "lowest": row["total"]["low"] * 1e3,
            "highest": row["total"]["high"] * 1e3,
        }
        for row in result["rows"]
    ]
    plans = [
        {
            "examples an epoch": f"{row['examples']:,}",
            "at group": f"{row['group']:,}",
            "naming a step's examples, ms": row["seconds"]["median"] * 1e3,
        }
        for row in result["plans"]
    ]
    by_case = {(row["group"], row["window"]): row["total"]["median"] for row in result["rows"]}
    targets = [
        Verdict(
            f"seconds at group {max(POSITIONS):,} over group 1, {'window' if window else 'whole epoch'}",
            LIMIT,
            by_case[max(POSITIONS), window] / by_case[1, window],
            at_least=False,
        ).row()
        for window in (None, 65_536)
    ]
    head = (
        f"{result['users']:,} users, {result['examples']:,} groups an epoch, {GLOBAL_BATCH_SIZE} groups a step, K = {NEGATIVES}, "
        f"{result['rows'][0]['total']['n']} repeats, one core"
    )
    return "\n\n".join(
        [head, *(results.table(part, markdown=markdown) for part in (rows, plans, targets)), results.stamp(result)]
    )


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--repeats", type=int, default=9)
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    result = {**results.facts(results.command_of("benchmarks.resume", words)), **run(repeats=given.repeats)}
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
