"""Grouped training against peers, side by side on one machine: groups a second, peak memory, ratios, targets.

    python -m benchmarks.peers --quick --out results.json      under 10 minutes on 2 cores
    python -m benchmarks.peers --full --out results.json       every point
    python -m benchmarks.peers --markdown results.json         the tables of docs/performance.md

benchmarks/peer_methods.py describes the methods, benchmarks/peer_trl.py TRL, and benchmarks/peer_worker.py how memory is
measured. Every method runs in a process of its own. Repeats are interleaved (a, b, d, a, b, d, ...), so that a slow minute of
the machine affects all methods. The benchmark refuses to print a comparison if losses differ by more than 1e-4.
"""

import contextlib
import importlib.metadata
import importlib.util
import json
import math
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peer_arguments import METHODS, earlier_rows, methods_of, points_of, shape_of
from benchmarks.peer_methods import Shape
from benchmarks.peer_targets import MAX_TOKENS, Point, by_point, ratio, rho, verdicts

TOLERANCE = 1e-4
SMOLLM: dict[str, Any] = {}  # the default shape
# Every K of a P has the same number of groups, since memory is compared between them. There are enough groups that a step of
# ours has 900 tokens or more; with fewer, the matrix products would be too small to be efficient.
FULL = [Point(p, 8, k, 8 if p == 100 else 2) for p in (100, 512) for k in (1, 3, 7, 15)]
QUICK = [point for point in FULL if point.negatives <= 3]
# Measured by its first step, which warms up the others: no target needs it, and it takes most of the time.
ONCE = ("a",)


class Child:
    """The process of one method."""

    def __init__(self, method: str, shape: dict[str, Any], threads: int) -> None:
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1"}
        arguments = [method, json.dumps(shape), str(threads)]
        self.process = results.run_apart("benchmarks.peer_worker", arguments, env=environment, stderr=subprocess.DEVNULL)

    def ask(self, order: dict[str, Any]) -> dict[str, Any]:
        """Sends an order and returns the answer. A process that died is a failed measurement (most likely out of memory)."""
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            self.process.stdin.write(json.dumps(order) + "\n")
            self.process.stdin.flush()
            line = self.process.stdout.readline()
        except BrokenPipeError:
            line = ""
        return dict(json.loads(line)) if line else {"error": f"its process exited ({self.process.poll()}); out of memory?"}

    def close(self) -> None:
        """Ends the process."""
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(BrokenPipeError):  # the process died before it read an order
                    pipe.close()


def methods_at(point: Point, wanted: list[str]) -> list[str]:
    """The methods that run at a point: c trains pairs only, and the target of e is about K = 3."""
    skip = {"c-default", "c-best", "c-liger"} if point.negatives != 1 else set()
    if point.negatives != 3:
        skip |= {"e", "e-apart"}
    return [method for method in wanted if method not in skip]


def activation_bytes(method: str, point: Point, shape: Any) -> float:
    """A lower bound of what a step holds: saved activations of every token that is fed, and for a three copies of its logits."""
    size = point.negatives + 1
    fed = {"a": size * (point.prompt + point.completion), "b": size * (point.prompt + point.completion - 1)}
    tokens = fed.get(method, 0) * max(1, min(point.groups, MAX_TOKENS // max(1, fed.get(method, 1))))
    logits = 3 * tokens * shape.vocab if method == "a" else 0
    return 4.0 * (tokens * shape.layers * (10 * shape.hidden + 5 * shape.intermediate) + logits)


def available_bytes() -> float:
    """The memory that is available on this machine."""
    try:
        lines = Path("/proc/meminfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return math.inf
    return next(float(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable"))


def measure_point(point: Point, children: dict[str, Child], shape: Any, repeats: int, budget: float) -> list[dict[str, Any]]:
    """The rows of one point. The first round warms up and checks the losses.

    More rounds follow until there are `repeats` or `budget` seconds are spent.
    """
    rows: dict[str, dict[str, Any]] = {}
    for method in methods_at(point, list(children)):
        rows[method] = {"method": method, **asdict(point), "samples": [], "cpu_samples": [], "peaks": []}
        needed = activation_bytes(method, point, shape)
        if 1.2 * needed + 2**30 > available_bytes():  # skip the method, or the kernel may kill it and others
            rows[method]["error"] = f"not run: needs about {needed / 2**30:.0f} GiB, too much for what is free"
            continue
        rows[method] |= children[method].ask({"build": asdict(point)})
        if "error" not in rows[method]:
            first = children[method].ask({"step": True})
            rows[method] |= {"error": first["error"]} if "error" in first else {"loss": first["loss"]}
            if method in ONCE and "error" not in first:
                add_sample(rows[method], first)
    check_losses(point, rows)
    rounds: list[float] = []
    for _ in range(repeats):
        start = time.perf_counter()
        for method, row in rows.items():
            if "error" in row or method == "e-apart" or method in ONCE:
                continue
            answer = children[method].ask({"step": True})
            if "error" in answer:
                row["error"] = answer["error"]
                continue
            add_sample(row, answer)
        rounds.append(time.perf_counter() - start)
        if sum(rounds) + rounds[-1] > budget:
            break
    for row in rows.values():
        if row["samples"] and "error" not in row:
            row["seconds"] = results.spread(row["samples"])
            row["groups_per_second"] = row["groups"] / row["seconds"]["median"]
            row["peak_bytes"] = max(row["peaks"])
    return [row for method, row in rows.items() if method != "e-apart"]


def add_sample(row: dict[str, Any], answer: dict[str, Any]) -> None:
    """Adds one measured step to the row."""
    row["samples"].append(answer["seconds"])
    row["cpu_samples"].append(answer["cpu_seconds"])
    row["peaks"].append(answer["peak_bytes"])


def check_losses(point: Point, rows: dict[str, dict[str, Any]]) -> None:
    """Raises SystemExit if two methods that do the same work have different losses."""
    pairs = [("a", "d"), ("b", "d"), ("c-default", "d"), ("c-best", "d"), ("c-liger", "d"), ("e", "e-apart")]
    for left, right in pairs:
        values = [rows.get(method, {}).get("loss") for method in (left, right)]
        if None in values:
            continue
        if not abs(values[0] - values[1]) <= TOLERANCE * max(1.0, abs(values[1])):
            raise SystemExit(
                f"{point.name}: the losses of {left} ({values[0]:.7f}) and {right} ({values[1]:.7f}) differ; "
                "a comparison would be wrong"
            )


def table_rows(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One line a measurement: speed, spread, memory, our ratios to the peers, share of the ideal."""
    found = by_point(rows)
    out = []
    for row in rows:
        here = (row["prompt"], row["negatives"], row["method"])
        against = {
            f"x {name}": ratio(found, here, (row["prompt"], row["negatives"], name)) if row["method"] in ("d", "e") else None
            for name in ("a", "b", "c-default", "c-best", "c-liger")
        }
        ideal = rho(row["prompt"], row["completion"], row["negatives"])
        seconds = row.get("seconds")
        shown = f"{seconds['median']:.3g} [{seconds['low']:.3g}, {seconds['high']:.3g}]" if seconds else row.get("error", "-")
        gain = against["x b"]
        out.append(
            {
                "P": row["prompt"],
                "K": row["negatives"],
                "method": row["method"],
                "groups/s": row.get("groups_per_second"),
                "seconds a step": shown,
                "groups a step": row["groups"],
                "tokens a step": row.get("tokens"),
                "peak MiB": row["peak_bytes"] / 2**20 if "peak_bytes" in row else None,
                **against,
                "rho": ideal if row["method"] == "d" else None,
                "of rho": gain / ideal if gain and row["method"] == "d" else None,
            }
        )
    return out


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    rows = result["rows"]
    parts = [results.table(table_rows(rows), markdown=markdown)]
    parts += [results.table([verdict.row() for verdict in verdicts(rows)], markdown=markdown)]
    parts += [*result["notes"], results.stamp(result)]
    return "\n\n".join(parts)


def run(
    points: list[Point],
    shape: dict[str, Any],
    *,
    threads: int,
    repeats: int,
    budget: float,
    wanted: list[str],
    save: Callable[[dict[str, Any]], None] = lambda result: None,
    done: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Measures the points that are not in the rows `done`. Hands the result so far to `save` after each point.

    budget: seconds a point.
    """
    methods, notes = wanted, []
    if importlib.util.find_spec("trl") is None:
        wanted = [method for method in wanted if not method.startswith("c-")]
        notes.append("c skipped: trl is not installed (pip install -c constraints.txt -e '.[peers]')")
    else:
        from benchmarks.peer_trl import VARIANTS

        notes.append(f"c: trl {importlib.metadata.version('trl')}, DPOConfig defaults changed by {VARIANTS}")
    if "e" in wanted:
        wanted = [*wanted, "e-apart"]
    points = [
        point for point in points if not any((point.prompt, point.negatives) == (row["prompt"], row["negatives"]) for row in done)
    ]
    needed = [method for method in wanted if any(method in methods_at(point, wanted) for point in points)]
    children = {method: Child(method, shape, threads) for method in needed}
    rows = [*done]
    result = {"rows": rows, "notes": notes, "shape": asdict(Shape(**shape)), "threads": threads, "methods": methods}
    try:
        for point in points:
            rows += measure_point(point, children, Shape(**shape), repeats, budget)
            save(result)
            print(f"{point.name}: measured", file=sys.stderr, flush=True)
    finally:
        for child in children.values():
            child.close()
    return result


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    size = parser.add_mutually_exclusive_group()
    size.add_argument("--quick", action="store_true", help="few points, few repeats: under 10 minutes on 2 cores (the default)")
    size.add_argument("--full", action="store_true", help="P in {100, 512}, K in {1, 3, 7, 15}")
    parser.add_argument("--points", type=points_of, help="P:K[:G],... instead of these, such as 100:3:4,512:15:1")
    parser.add_argument("--methods", type=methods_of, default=list(METHODS), help=f"which of {','.join(METHODS)}")
    parser.add_argument("--repeats", type=results.positive, help="most rounds a point (3; with --full 5)")
    parser.add_argument("--threads", type=results.positive, default=os.cpu_count() or 1)
    parser.add_argument("--shape", type=shape_of, default={}, help="changes of the 135M model as JSON, such as '{\"layers\": 2}'")
    parser.add_argument("--resume", action="store_true", help="keep the points in --out that were measured the same way")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    if given.resume and not given.out:
        parser.error("--resume needs --out, the file of an earlier run")
    points = given.points or (FULL if given.full else QUICK)
    facts = results.facts(results.command_of("benchmarks.peers", words))
    done: list[dict[str, Any]] = []
    if given.resume and given.out.exists():
        now = {**facts, "shape": asdict(Shape(**given.shape)), "threads": given.threads, "methods": given.methods}
        try:
            done = earlier_rows(given.out, points, now)
        except (OSError, ValueError, KeyError, TypeError) as fault:
            parser.error(f"--resume: {given.out} cannot be continued: {fault}")
    try:
        measured = run(
            points,
            given.shape,
            threads=given.threads,
            repeats=given.repeats or (5 if given.full else 3),
            budget=180.0 if given.full else 60.0,
            wanted=given.methods,
            done=done,
            save=lambda measured: results.write(given.out, {**facts, **measured}) if given.out else None,
        )
    except KeyboardInterrupt:
        kept = f"; {given.out} has the points measured so far, continue with --resume" if given.out else ""
        raise SystemExit(f"interrupted{kept}") from None
    print(report({**facts, **measured}))


if __name__ == "__main__":
    main()
