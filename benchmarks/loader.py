"""The loader alone: packed tokens a second on one core, at the size of MovieLens-1M, for S-DPO with 15 negatives.

    python -m benchmarks.loader --out results.json             synthetic: 6,040 users, 3,533 items, 575k interactions
    python -m benchmarks.loader --source ml-1m                 the real data set, fetched on first use
    python -m benchmarks.loader --markdown results.json

It uses the project's own code: prepare, tokenise, then per step sample, draw all examples, pack micro-batches, assign them to
ranks, build rank 0's and collate them (training/loader.py: step_work). Prepare and tokenising happen once and are timed
separately. The target is 500k packed tokens a second on one core, a hundred times what a GPU consumes when it trains an 8B
model. "held" is what a step's planning takes from a thread that runs Python beside it, as the one that launches kernels does:
the time that the interpreter's lock is held, and what the other thread of the same core takes. "by a process" is the same with
train.dataloader_num_workers=1. Both need a second core that is idle.
"""

import cProfile
import os
import pstats
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import torch

from benchmarks import results
from benchmarks.peer_targets import Verdict
from rec_dist.config.schema import DataConfig, PromptConfig
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.prompts.builder import PromptBuilder, build_prompt_builder
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.data.sampling.targets import index_targets
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.task import language_task
from rec_dist.methods.preference import sdpo
from rec_dist.methods.task import Task
from rec_dist.models.assemble import ModelSpec
from rec_dist.runtime.messages import messages_to
from rec_dist.runtime.world import World
from rec_dist.training.loader import step_work, steps_ahead

TARGET = 500_000
NUM_USERS, NUM_ITEMS, NUM_POSITIVES = 6040, 3533, 575_000
CASES = [  # targets a prompt, groups a step, kind of negatives, world size
    (1, 512, "uniform", 1),
    (1, 512, "popularity", 1),
    (10, 1000, "uniform", 1),
    (1, 2048, "uniform", 8),
    (1, 8192, "uniform", 512),  # 16 groups a rank
    (1, 8192, "uniform", 1),  # the same step on one rank, which builds all of it
]


def write_synthetic(path: Path, *, users: int = NUM_USERS, items: int = NUM_ITEMS, positives: int = NUM_POSITIVES) -> None:
    """Writes a csv file: log-normal sequence lengths as in MovieLens, items by a power law, titles of 1 to 5 words."""
    rng = np.random.default_rng(0)
    words = np.asarray(["".join(rng.choice(list("aeioulnrstdm"), size=rng.integers(3, 9))) for _ in range(800)])
    titles = [" ".join(rng.choice(words, size=rng.integers(1, 6))).title() + f" {number}" for number in range(items)]
    raw = rng.lognormal(mean=4.0, sigma=1.0, size=users)
    lengths = np.clip((raw * positives / raw.sum()).astype(int), 6, items // 3)
    popularity = 1.0 / (np.arange(items) + 20.0)
    lines = ["user,item,rating,timestamp,title"]
    for user, length in enumerate(lengths.tolist()):
        keys = rng.exponential(size=items) / popularity  # the smallest keys are a draw without replacement by popularity
        for place, item in enumerate(np.argpartition(keys, length)[:length].tolist()):
            lines.append(f"u{user},i{item},5,{user * 1000 + place},{titles[item]}")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def small_tokenizer(texts: list[str]) -> Any:
    """A byte-level BPE of 8k tokens learned from the titles, about 5 tokens a title. Nothing is downloaded."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=8000, special_tokens=["<eos>"], initial_alphabet=alphabet, show_progress=False)
    bpe.train_from_iterator([f" {text}" for text in texts], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<eos>")


def make_task(
    data: PreparedData,
    split: SequenceSplit,
    builder: PromptBuilder,
    *,
    per_prompt_targets: int,
    groups: int,
    kind: Any,
    negatives: int,
) -> Task:
    """An S-DPO task on the training split, without a model."""
    targets = index_targets(split, per_prompt_targets)
    return language_task(
        sdpo(beta=1.0, num_negatives=negatives),
        ModelSpec(
            path=Path(),
            dtype=torch.float32,
            device="cpu",
            attention="sdpa",
            activation_checkpointing=False,
            adapter=None,
            initial_adapter=None,
            keep_reference=False,
            seed=0,
        ),
        InteractionExamples(data, split, targets, builder, NegativeSampler(kind, negatives, 0, data.train_counts), False),
        sampler=GlobalBatchSampler(len(targets), groups // per_prompt_targets, 1, 0),
        reference_key="",
        width=64,
    )


def measure(task: Task, *, steps: int, repeats: int, world: World) -> dict[str, Any]:
    """Times whole steps of one rank. Tokens and groups are those of the whole step, which every rank draws and packs."""
    step_work(task, 0, max_tokens=8192, world=world)
    seconds = []
    chosen = [step % task.sampler.num_steps for step in range(1, steps + 1)]
    for _ in range(repeats):
        start = time.perf_counter()
        work = [step_work(task, step, max_tokens=8192, world=world) for step in chosen]
        seconds.append(time.perf_counter() - start)
    tokens, groups = sum(step.num_tokens for step in work), sum(step.num_groups for step in work)
    median = results.spread(seconds)
    return {
        "seconds": median,
        "tokens": tokens,
        "groups": groups,
        "tokens_per_second": tokens / median["median"],
        "logical_tokens_per_second": sum(step.num_logical_tokens for step in work) / median["median"],
        "microseconds_per_group": median["median"] / groups * 1e6,
        "seconds_per_step": median["median"] / steps,
        "held_seconds_per_step": held_a_step(task, chosen, world, num_workers=0),
        "held_by_process_seconds_per_step": held_a_step(task, chosen, world, num_workers=1),
    }


def held_a_step(task: Task, steps: list[int], world: World, *, num_workers: int) -> float:
    """What the launching thread loses to the making of a step in a thread, or in `num_workers` processes, once they are warm."""
    with steps_ahead(task, steps, max_tokens=8192, world=world, num_workers=num_workers) as work:
        next(work)
        return held(lambda: list(work)) / max(len(steps) - 1, 1)


def held(work: Callable[[], Any]) -> float:
    """Seconds that a Python loop loses to `work` in a thread beside it."""

    def loops(until: Callable[[], bool]) -> tuple[int, float]:
        count, start = 0, time.perf_counter()
        while not until():
            for _ in range(1000):
                pass
            count += 1
        return count, time.perf_counter() - start

    end = time.perf_counter() + 0.5
    alone, seconds = loops(lambda: time.perf_counter() > end)
    thread = threading.Thread(target=work)
    thread.start()
    beside, together = loops(lambda: not thread.is_alive())
    return max(together - beside * seconds / alone, 0.0)


def profile(task: Task, steps: int) -> list[dict[str, Any]]:
    """The functions that take the most time themselves. The profiler slows small calls."""
    profiler = cProfile.Profile()
    profiler.enable()
    for step in range(steps):
        step_work(task, step, max_tokens=8192, world=World())
    profiler.disable()
    stats: Any = pstats.Stats(profiler)
    total = stats.total_tt
    entries = sorted(stats.stats.items(), key=lambda entry: -entry[1][2])[:10]
    return [
        {"function": f"{Path(file).name}:{name}", "share": own / total, "calls": calls}
        for (file, _, name), (_, calls, own, _, _) in entries
    ]


def run(source: str | None, *, steps: int, repeats: int, negatives: int, sizes: dict[str, int] | None = None) -> dict[str, Any]:
    """Prepares the data in a temporary folder and measures every case."""
    torch.set_num_threads(1)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        if source is None:
            source = str(Path(folder) / "interactions.csv")
            write_synthetic(Path(source), **(sizes or {}))
        start = time.perf_counter()
        config = DataConfig(source=source, path=f"{folder}/prepared", split="leave_one_out", min_rating=4.0)
        from rec_dist.data.prepare.prepare import prepare

        with messages_to(lambda line: print(line, file=sys.stderr)):
            prepare(config)
        prepared = time.perf_counter()
        data = PreparedData.open(config.path)
        builder = build_prompt_builder(PromptConfig(), small_tokenizer(data.titles), data.titles)
        tokenised = time.perf_counter()
        split = data.split("train")
        for per_prompt_targets, groups, kind, ranks in CASES:
            task = make_task(
                data, split, builder, per_prompt_targets=per_prompt_targets, groups=groups, kind=kind, negatives=negatives
            )
            case = {"targets a prompt": per_prompt_targets, "groups a step": groups, "negatives": kind, "ranks": ranks}
            rows.append({**case, **measure(task, steps=steps, repeats=repeats, world=World(0, ranks))})
        task = make_task(data, split, builder, per_prompt_targets=1, groups=512, kind="uniform", negatives=negatives)
        return {
            "rows": rows,
            "profile": profile(task, steps),
            "prepare_seconds": prepared - start,
            "tokenise_seconds": tokenised - prepared,
            "tokens_per_title": float(builder.titles.lengths.mean()),
            "users": len(split),
            "items": data.num_items,
            "num_negatives": negatives,
        }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    rows = [
        {
            **{name: row[name] for name in ("targets a prompt", "groups a step", "negatives", "ranks")},
            "tokens/s": row["tokens_per_second"],
            "logical tokens/s": row["logical_tokens_per_second"],
            "us a group": row["microseconds_per_group"],
            "ms a step": row["seconds_per_step"] * 1e3,
            "ms held": row["held_seconds_per_step"] * 1e3,
            "by a process": row["held_by_process_seconds_per_step"] * 1e3,
            "tokens a group": row["tokens"] / row["groups"],
        }
        for row in result["rows"]
    ]
    slowest = min(row["tokens_per_second"] for row in result["rows"])
    where = [{**entry, "share": f"{entry['share']:.0%}"} for entry in result["profile"]]
    head = (
        f"K={result['num_negatives']}, {result['users']:,} users, {result['items']:,} items, {result['tokens_per_title']:.1f} "
        f"tokens a title; prepare {result['prepare_seconds']:.1f} s, tokenise {result['tokenise_seconds']:.1f} s, one core"
    )
    target = Verdict("packed tokens a second on one core, slowest case", TARGET, slowest).row()
    tables = [results.table(part, markdown=markdown) for part in (rows, where, [target])]
    return "\n\n".join([head, *tables, results.stamp(result)])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--source", help="a known data set or a file (default: synthetic interactions of MovieLens-1M's size)")
    parser.add_argument("--negatives", type=int, default=15)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=5)
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    measured = run(given.source, steps=given.steps, repeats=given.repeats, negatives=given.negatives)
    result = {**results.facts(results.command_of("benchmarks.loader", words)), **measured}
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
