"""How fast the quickstart trains here and with an older commit: its SFT and S-DPO stages, run in turns on the same machine.

    python -m benchmarks.quickstart_rate --steps 6 --repeats 3 --out quickstart_rate.json
    python -m benchmarks.quickstart_rate --base faf3134 --set model.dtype=float32
    python -m benchmarks.quickstart_rate --markdown quickstart_rate.json

Each run is `rec-dist train` with the shipped configuration of its own tree, cut to a few steps, with the same data and model. The
older commit is checked out into a temporary worktree, and its packages are those of this interpreter. Rates come from the rows
of metrics.jsonl: the steps but the first of each run, and the pass that caches the reference. Both trees must train on the same
number of groups a step, and tokens are counted as this tree counts them, so that a tree that runs more rows for the same groups
gains nothing. Cost: about 2 minutes for each repeat on 2 idle cores with AMX, 6 without; the first use fetches data and model.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import results
from rec_dist.runtime.rows import read_rows

ROOT = Path(__file__).resolve().parents[1]
BASE = "faf3134"
STAGES = ("sft", "sdpo")


@dataclass(frozen=True)
class Tree:
    """A checkout, and how the configuration of a stage is named there. changes: overrides for all of its runs."""

    name: str
    root: Path
    target: str  # with {} for the stage
    changes: tuple[str, ...]

    def run(self, command: str, stage: str, *changes: str) -> None:
        """Runs `rec-dist COMMAND` on a stage. Raises SystemExit with the end of its messages if it fails."""
        paths = os.pathsep.join([str(self.root), str(self.root / "kernels")])
        line = [sys.executable, "-m", "rec_dist", command, self.target.format(stage), *changes, *self.changes]
        # Without it the older commit joins whatever cluster a file in /tmp names, and waits if that one is gone.
        environment = {**os.environ, "PYTHONPATH": paths, "RAY_ADDRESS": "local"}
        done = subprocess.run(line, cwd=self.root, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{self.name}: {' '.join(line[2:])} failed:\n{done.stderr[-3000:]}")


@contextmanager
def checked_out(commit: str, folder: Path) -> Iterator[Path]:
    """A worktree of `commit` in `folder`, which is removed at the end."""
    tree = folder / "base"
    _git("worktree", "add", "--detach", "--quiet", str(tree), commit)
    try:
        yield tree
    finally:
        _git("worktree", "remove", "--force", str(tree))


def _git(*words: str) -> None:
    done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"git {' '.join(words[:2])} failed: {done.stderr.strip()}")


def measure(trees: Sequence[Tree], folder: Path, *, steps: int, repeats: int) -> list[dict[str, Any]]:
    """Runs every stage of every tree `repeats` times, in turns. A row for each stage and tree."""
    for tree in trees:
        tree.run("prepare", "sft", f"data.path={folder / tree.name}-data")
    found: dict[tuple[str, str], list[list[dict[str, Any]]]] = {}
    for repeat in range(repeats):
        order = trees if repeat % 2 == 0 else trees[::-1]
        for stage in STAGES:
            for tree in order:
                run_dir = folder / f"{tree.name}-{stage}-{repeat}"
                changes = [f"data.path={folder / tree.name}-data", f"train.run_dir={run_dir}", f"train.max_steps={steps}"]
                if stage == "sdpo":
                    changes.append(f"train.init_from={folder / tree.name}-sft-0")
                tree.run("train", stage, *changes)
                found.setdefault((stage, tree.name), []).append(read_rows(run_dir / "metrics.jsonl"))
    dtypes = {tree.name: _dtype(folder / f"{tree.name}-sft-0") for tree in trees}
    return [{**row, "dtype": dtypes[row["tree"]]} for row in rows_of(found, [tree.name for tree in trees])]


def rows_of(found: dict[tuple[str, str], list[list[dict[str, Any]]]], names: Sequence[str]) -> list[dict[str, Any]]:
    """found: (stage, tree) -> the rows of metrics.jsonl of each of its runs. names: of the trees, that whose tokens count first."""
    rows = []
    for stage in STAGES:
        counted = [_steps(run) for run in found[stage, names[0]]]
        for name in names:
            runs = [_steps(run) for run in found[stage, name]]
            if [[row["groups"] for row in run] for run in runs] != [[row["groups"] for row in run] for run in counted]:
                raise SystemExit(f"{stage}: {name} and {names[0]} trained on other numbers of groups, so rates do not compare")
            rates = [_rate(own, run) for own, run in zip(counted, runs, strict=True)]
            rows.append({"stage": stage, "tree": name, "tokens_per_second": results.spread(rates)})
    passes = {name: [_passes(run) for run in found["sdpo", name]] for name in names}
    for name in names:
        rates = [_rate(own, run, "seconds") for own, run in zip(passes[names[0]], passes[name], strict=True)]
        rows.append({"stage": "reference", "tree": name, "tokens_per_second": results.spread(rates)})
    return rows


def _dtype(run_dir: Path) -> str:
    """What the runs of a tree computed in; auto was float32 on CPUs until it was settled when a run begins."""
    dtype: str = json.loads((run_dir / "config.json").read_text(encoding="utf-8"))["model"]["dtype"]
    return "float32" if dtype == "auto" else dtype


def _steps(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """The steps but the first, which also warms up."""
    return [row for row in run if row.get("event") == "step"][1:]


def _passes(run: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [row for row in run if row.get("event") == "reference"]


def _rate(counted: Sequence[dict[str, Any]], timed: Sequence[dict[str, Any]], key: str = "step_seconds") -> float:
    return float(sum(row["tokens"] for row in counted) / sum(row[key] for row in timed))


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Tokens/s of each stage and tree, and the ratio of the medians to the older commit."""
    medians = {(row["stage"], row["tree"]): row["tokens_per_second"]["median"] for row in result["rows"]}
    base = result["rows"][-1]["tree"]
    table = [
        {
            "stage": row["stage"],
            "tree": row["tree"],
            "dtype": row["dtype"],
            "tokens/s, median": row["tokens_per_second"]["median"],
            "lowest": row["tokens_per_second"]["low"],
            "highest": row["tokens_per_second"]["high"],
            "runs": row["tokens_per_second"]["n"],
            f"times {base}": medians[row["stage"], row["tree"]] / medians[row["stage"], base],
        }
        for row in result["rows"]
    ]
    text = results.table(table, markdown=markdown)
    load = ", ".join(f"{value:.1f}" for value in result["load"])
    return f"{text}\n\n{results.stamp(result)}; load average before and after: {load}"


def main(arguments: list[str] | None = None) -> None:
    """The command line."""
    parser = results.parser_of(__doc__)
    parser.add_argument("--base", default=BASE, help=f"older commit, from {BASE} on (default: %(default)s)")
    parser.add_argument("--steps", type=results.positive, default=6, help="steps of each run, at least 2 (default: %(default)s)")
    parser.add_argument("--repeats", type=results.positive, default=3, help="runs of each stage and tree (default: %(default)s)")
    parser.add_argument("--set", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for this tree alone")
    parser.add_argument(
        "--both", nargs="*", default=[], metavar="KEY=VALUE", help="overrides for both trees, keys that both know"
    )
    given = parser.parse_args(arguments)
    if results.rendered(parser, given, report):
        return
    if given.steps < 2:
        parser.error("--steps must be 2 or more: the first step is not counted")
    words = sys.argv[1:] if arguments is None else arguments
    load = [os.getloadavg()[0]]
    with tempfile.TemporaryDirectory(prefix="quickstart-") as place, checked_out(given.base, Path(place)) as base:
        trees = [
            Tree("here", ROOT, "quickstart:{}", (*given.both, *given.set)),
            Tree(given.base, base, "configs/quickstart-{}.yaml", tuple(given.both)),
        ]
        rows = measure(trees, Path(place), steps=given.steps, repeats=given.repeats)
    load.append(os.getloadavg()[0])
    about = results.facts(results.command_of("benchmarks.quickstart_rate", words), rows=rows, load=load, base=given.base)
    results.conclude(about, report, given.out)


if __name__ == "__main__":
    main()
