"""`rec-dist rank` of SASRec and of neighbours for users in a file: users a second, and the memory at two numbers of users.

    python -m benchmarks.rank --out rank.json
    python -m benchmarks.rank --items 3500 --users 100000 1000000
    python -m benchmarks.rank --markdown rank.json

SASRec has the shape of the recipe sequential-ml-1m:sasrec (width 64, 2 blocks, 100 items) and random weights: what it costs does
not depend on them. Neighbours are those of the users that the catalogue was prepared from, few of each item: what they cost is
the row of the catalogue that each user's scores fill. A history has 10 to 200 items, drawn by Zipf's law. Each command is a
process of its own: JSON lines in, Parquet out, ten items a user, none of them seen. "users/s" leaves out the start, by the
difference between both numbers of users. "peak" is the largest resident memory of the process. Cost: about a minute on 2 idle
cores with the default numbers of users.
"""

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks import results
from rec_dist.commands.prepare import prepare
from rec_dist.commands.train import train
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import to_yaml
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.methods.sequential.next_item import build_recommender
from rec_dist.methods.sequential.saved_model import save_recommender
from rec_dist.runtime.quiet import quieten
from rec_dist.runtime.run_directory import RunDirectory

MODELS = {"sasrec": "sequential", "neighbours": "neighbours"}  # task.kind of each
CATALOGUES = (3_500, 100_000)  # MovieLens-1M, and a shop
SHAPE = {"width": 64, "num_layers": 2, "num_heads": 1, "dropout": 0.1, "max_length": 100}
_ROW_ITEMS = 50
_ITEMS_AT_ONCE = 10_000  # users that are written together


def make_run(folder: Path, num_items: int, kind: str = "sequential") -> Path:
    """A finished run of SASRec with random weights, or of neighbours, on a catalogue of num_items. Returns its directory."""
    source = folder / "rows.csv"
    with source.open("w", encoding="utf-8") as file:
        file.write("user,item,timestamp\n")
        for user in range(-(-num_items // _ROW_ITEMS)):
            items = range(user * _ROW_ITEMS, (user + 1) * _ROW_ITEMS)
            file.writelines(f"{user},i{item % num_items},{step}\n" for step, item in enumerate(items))
    config = pinned(
        RunConfig.model_validate(
            {
                "data": {"source": str(source), "path": str(folder / "data"), "split": "user_ratio"},
                "task": {"kind": kind} | ({"sequential": {"model": "sasrec", **SHAPE}} if kind == "sequential" else {}),
                "train": {"run_dir": str(folder / "run")},
            }
        )
    )
    prepare(config)
    data, run = open_data(config.data), RunDirectory(folder / "run")
    assert data.num_items == num_items
    if kind == "neighbours":
        return train(config, progress=False, owns_process=False).path
    torch.manual_seed(0)
    with run.claimed(config.model_dump(mode="json"), to_yaml(config)):
        model = build_recommender("sasrec", {**SHAPE, "num_items": num_items})
        run.model.mkdir()
        save_recommender(model.shape, dict(model.state_dict()), data, run.model)
        run.finish({"step": 1})
    return run.path


def write_histories(path: Path, num_users: int, num_items: int) -> None:
    """Writes num_users histories as JSON lines; popular items by Zipf's law with exponent 1.1."""
    rng = np.random.default_rng(0)
    shares = np.cumsum(1.0 / np.arange(1, num_items + 1) ** 1.1)
    with path.open("w", encoding="utf-8") as file:
        for begin in range(0, num_users, _ITEMS_AT_ONCE):
            lengths = rng.integers(10, 201, min(_ITEMS_AT_ONCE, num_users - begin))
            items = np.searchsorted(shares, rng.random(lengths.sum()) * shares[-1])
            names = [f"i{item}" for item in np.minimum(items, num_items - 1).tolist()]
            ends = np.cumsum(lengths).tolist()
            for user, (length, end) in enumerate(zip(lengths.tolist(), ends, strict=True), start=begin):
                file.write(json.dumps({"user_id": f"u{user:07d}", "history": names[end - length : end]}) + "\n")


def measured(*words: str) -> dict[str, float]:
    """Wall seconds, CPU seconds and peak bytes of one command, `rec-dist WORDS`."""
    command = [sys.executable, "-m", "rec_dist", *words]
    began = time.perf_counter()
    with tempfile.TemporaryFile() as log:
        process = subprocess.Popen(command, stdout=log, stderr=log)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise SystemExit(f"{' '.join(command)} ended with {process.returncode}:\n{log.read().decode()}")
    seconds = time.perf_counter() - began
    return {"seconds": seconds, "cpu_seconds": usage.ru_utime + usage.ru_stime, "peak_bytes": usage.ru_maxrss * 1024.0}


def run_all(models: Sequence[str], catalogues: Sequence[int], users: Sequence[int]) -> list[dict[str, Any]]:
    """A row for each model, catalogue and number of users."""
    rows = []
    for model, num_items in product(models, catalogues):
        with tempfile.TemporaryDirectory(prefix="rank-") as place:
            folder = Path(place)
            run = make_run(folder, num_items, MODELS[model])
            for num_users in users:
                histories, output = folder / f"{num_users}.jsonl", folder / f"{num_users}.parquet"
                write_histories(histories, num_users, num_items)
                words = ("rank", str(run), "--histories", str(histories), "--out", str(output))
                rows.append({"model": model, "items": num_items, "users": num_users, **measured(*words)})
                print(rows[-1], file=sys.stderr, flush=True)
                histories.unlink()
                output.unlink()
    return rows


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the table of a result."""
    rows, before = [], None
    for row in result["rows"]:
        more = before is not None and all(before[name] == row[name] for name in ("model", "items"))
        seconds = row["seconds"] - before["seconds"] if before is not None and more else 0.0
        rate = (row["users"] - before["users"]) / seconds if before is not None and seconds > 0 else None
        rows.append(
            {
                "model": row["model"],
                "items": f"{row['items']:,}",
                "users": f"{row['users']:,}",
                "wall s": f"{row['seconds']:.1f}",
                "CPU s": f"{row['cpu_seconds']:.1f}",
                "users/s": None if rate is None else f"{rate:,.0f}",
                "peak MiB": f"{row['peak_bytes'] / 2**20:,.0f}",
            }
        )
        before = row
    return f"{results.table(rows, markdown=markdown)}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--models", choices=list(MODELS), nargs="+", default=list(MODELS), help="whose lists (both)")
    parser.add_argument("--items", type=results.positive, nargs="+", default=[*CATALOGUES], help="sizes of the catalogue")
    parser.add_argument("--users", type=results.positive, nargs="+", default=[1_000, 10_000], help="numbers of users, ascending")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    quieten()
    rows = run_all(given.models, given.items, given.users)
    results.conclude(results.facts(results.command_of("benchmarks.rank", words), rows=rows), report, given.out)


if __name__ == "__main__":
    main()
