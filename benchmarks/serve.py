"""`rec-dist serve` under load: requests a second, latency and batch fill, a lost replica, and memory over many requests.

    python -m benchmarks.serve --out serve.json                            # SASRec with random weights, 3,500 items
    python -m benchmarks.serve runs/quickstart/ensemble --clients 1 8 64
    python -m benchmarks.serve runs/quickstart/sdpo --scopes 20 --launcher ray
    python -m benchmarks.serve --markdown serve.json

The server is a process of its own. Clients are threads of this process, each with one connection on loopback, and ask again as
soon as they have an answer, so they share the cores with the server. A request ranks 20 candidates drawn at random, or the whole
catalogue, after the history of one of --users users of the data set: with fewer users, each asks more often. "fill" is the mean
number of requests that were scored together; "prompts kept" the share of a language model's prompts that the server had at least
the beginning of; "failed" counts every answer other than 200. With --launcher ray a replica is killed under the load of 8 clients:
"recovery" is the longest time from the kill to an answer. Memory is the resident one of the server and all its children, at five
times.
Cost: --seconds for each row, at most 30 times that for memory, and a start of 10 s (60 s on Ray) for each run.
"""

import argparse
import http.client
import json
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from benchmarks import results
from benchmarks.rank import make_run
from rec_dist.config.load import load_saved
from rec_dist.data.dataset.prepared_data import open_data
from rec_dist.ranking.users import PreparedUsers
from rec_dist.runtime.quiet import quieten

CANDIDATES, KILL_CLIENTS, USERS = 20, 8, 500
_START_SECONDS = 300.0


@dataclass
class Answers:
    """What clients saw. done: when each answer was there. failed: answers other than 200."""

    seconds: list[float]
    done: list[float]
    failed: int


def questions(run: Path, num_users: int) -> dict[str, list[bytes]]:
    """Bodies of requests by scope, from the histories of the run's users."""
    data = open_data(load_saved(run / "config.yaml").data)
    block = PreparedUsers(data, None).block(slice(0, num_users))
    rng = np.random.default_rng(0)
    bodies: dict[str, list[bytes]] = {str(CANDIDATES): [], "catalogue": []}
    for history in block.histories:
        names = [data.raw_items[item] for item in history.tolist()]
        drawn = [data.raw_items[item] for item in rng.permutation(data.num_items)[:CANDIDATES].tolist()]
        bodies[str(CANDIDATES)].append(json.dumps({"history": names, "candidates": drawn, "exclude_seen": False}).encode())
        bodies["catalogue"].append(json.dumps({"history": names}).encode())
    return bodies


@contextmanager
def server(run: Path, launcher: str) -> Iterator[tuple[int, psutil.Process]]:
    """The port of a server of the run, and its process."""
    words = ["serve", str(run), "--port", "0", "--deadline", "120", "--queue", "1000", f"cluster.launcher={launcher}"]
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    command = [sys.executable, "-m", "rec_dist", *words]
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(command, stderr=log, env=environment)
        try:
            deadline = time.monotonic() + _START_SECONDS
            while not (found := re.search(r"at http://127\.0\.0\.1:(\d+)/", _text(log.fileno()))):
                if process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"the server did not start: {_text(log.fileno())[-2000:]}")
                time.sleep(0.1)
            yield int(found[1]), psutil.Process(process.pid)
            process.send_signal(signal.SIGTERM)
            if process.wait(180):
                raise RuntimeError(f"the server ended with {process.returncode}: {_text(log.fileno())[-2000:]}")
        finally:
            process.kill()
            process.wait()


def _text(handle: int) -> str:
    return os.pread(handle, 1 << 20, 0).decode(errors="replace")


def load(port: int, bodies: Sequence[bytes], clients: int, *, seconds: float, most: int) -> Answers:
    """Asks with so many clients at once, for so many seconds or requests, whichever comes first."""
    answers, lock, end = Answers([], [], 0), threading.Lock(), time.monotonic() + seconds
    left = iter(range(most))

    def client(seed: int) -> None:
        rng, connection = random.Random(seed), http.client.HTTPConnection("127.0.0.1", port, timeout=180)
        while time.monotonic() < end:
            with lock:
                if next(left, None) is None:
                    break
            began = time.monotonic()
            try:
                connection.request("POST", "/v1/rank", rng.choice(bodies), {"content-type": "application/json"})
                reply = connection.getresponse()
                reply.read()
                status = reply.status
            except (OSError, http.client.HTTPException):
                status = 0
                connection.close()
            done = time.monotonic()
            with lock:
                answers.failed += status != 200
                answers.seconds.append(done - began)
                answers.done.append(done)
        connection.close()

    threads = [threading.Thread(target=client, args=(number,)) for number in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def counters(port: int) -> dict[str, float]:
    """What the server has counted so far: requests scored, batches, prompts of a language model, those whose beginning was kept."""
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=60)
    connection.request("GET", "/metrics")
    text = connection.getresponse().read().decode()
    connection.close()
    batches = dict(re.findall(r"^rec_dist_serve_batch_requests_(sum|count) (\S+)$", text, re.MULTILINE))
    prompts = dict(re.findall(r'^rec_dist_serve_prompts_total\{outcome="(\w+)"\} (\S+)$', text, re.MULTILINE))
    counts = {outcome: float(count) for outcome, count in prompts.items()}
    kept = counts.get("hit", 0.0) + counts.get("extension", 0.0)
    return {"requests": float(batches["sum"]), "batches": float(batches["count"]), "prompts": sum(counts.values()), "kept": kept}


def load_row(port: int, bodies: Sequence[bytes], clients: int, given: argparse.Namespace) -> dict[str, Any]:
    """One row of the table of load."""
    load(port, bodies, clients, seconds=1.0, most=given.requests)  # warms up
    before, began = counters(port), time.monotonic()
    answers = load(port, bodies, clients, seconds=given.seconds, most=given.requests)
    elapsed, counted = time.monotonic() - began, {name: count - before[name] for name, count in counters(port).items()}
    p50, p95, p99 = (float(np.percentile(answers.seconds, share)) for share in (50, 95, 99))
    return {
        "clients": clients,
        "requests": len(answers.seconds),
        "rate": len(answers.seconds) / elapsed,
        "p50": p50,
        "p95": p95,
        "p99": p99,
        "fill": counted["requests"] / max(1.0, counted["batches"]),
        "kept_prompts": counted["kept"] / counted["prompts"] if counted["prompts"] else None,
        "failed": answers.failed,
    }


def kill_row(port: int, process: psutil.Process, bodies: Sequence[bytes], given: argparse.Namespace) -> dict[str, Any]:
    """Kills a replica under load. recovery: the longest time without an answer that begins after the kill."""
    killed: list[float] = []

    def kill() -> None:
        time.sleep(2.0)
        replicas = [child for child in process.children(recursive=True) if "ray::ServeReplica" in " ".join(child.cmdline())]
        killed.append(time.monotonic())
        replicas[0].kill()

    thread = threading.Thread(target=kill)
    thread.start()
    answers = load(port, bodies, KILL_CLIENTS, seconds=2.0 + 6 * given.seconds, most=10 * given.requests)
    thread.join()
    done = sorted(answers.done)
    gaps = [later - sooner for sooner, later in pairwise(done) if later >= killed[0]]
    return {"requests": len(done), "failed": answers.failed, "recovery": max(gaps, default=float("nan"))}


def memory_row(port: int, process: psutil.Process, bodies: Sequence[bytes], given: argparse.Namespace) -> dict[str, Any]:
    """MiB after each fifth of --steady requests, or of as many as fit 6 * --seconds."""
    mebibytes, count = [], 0
    for _ in range(5):
        count += len(load(port, bodies, KILL_CLIENTS, seconds=6 * given.seconds, most=given.steady // 5).seconds)
        own = process.memory_info().rss
        mebibytes.append((own + sum(child.memory_info().rss for child in process.children(recursive=True))) >> 20)
    return {"requests": count, "mebibytes": mebibytes}


def measure(run: Path, given: argparse.Namespace) -> dict[str, Any]:
    """All numbers of one run."""
    bodies = questions(run, given.users)
    with server(run, given.launcher) as (port, process):
        rows = [
            {"scope": scope, **load_row(port, bodies[scope], clients, given)}
            for scope in given.scopes
            for clients in given.clients
        ]
        found: dict[str, Any] = {"run": run.name, "launcher": given.launcher, "load": rows}
        if given.steady:
            found["memory"] = memory_row(port, process, bodies[given.scopes[0]], given)
        if given.launcher == "ray":
            found["kill"] = kill_row(port, process, bodies[given.scopes[0]], given)
    return found


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    load_rows = [
        {
            "run": found["run"],
            "scores": row["scope"],
            "clients": row["clients"],
            "requests/s": row["rate"],
            **{f"{name} ms": row[name] * 1000 for name in ("p50", "p95", "p99")},
            "fill": row["fill"],
            "prompts kept": None if (kept := row.get("kept_prompts")) is None else f"{kept:.0%}",
            "failed": str(row["failed"]),
        }
        for found in result["rows"]
        for row in found["load"]
    ]
    lines = [results.table(load_rows, markdown=markdown)]
    for found in result["rows"]:
        if "memory" in found:
            sizes = ", ".join(f"{size:,}" for size in found["memory"]["mebibytes"])
            lines.append(f"{found['run']}: {sizes} MiB over {found['memory']['requests']:,} requests")
        if "kill" in found:
            row = found["kill"]
            lost = f"{row['failed']} of {row['requests']:,} requests failed, {row['recovery']:.1f} s without an answer"
            lines.append(f"{found['run']}: a replica was killed under {KILL_CLIENTS} clients; {lost}")
    return "\n\n".join([*lines, results.stamp(result)])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("runs", type=Path, nargs="*", help="finished runs; without any, SASRec with random weights")
    parser.add_argument("--clients", type=results.positive, nargs="+", default=[1, 4, 16, 64], help="clients at once")
    parser.add_argument("--scopes", nargs="+", choices=(str(CANDIDATES), "catalogue"), default=[str(CANDIDATES), "catalogue"])
    parser.add_argument("--seconds", type=float, default=10.0, help="of each row (10)")
    parser.add_argument("--requests", type=results.positive, default=20_000, help="most requests of each row (20000)")
    parser.add_argument("--steady", type=int, default=10_000, help="requests over which memory is followed; 0: none (10000)")
    parser.add_argument("--users", type=results.positive, default=USERS, help=f"users whose histories are asked for ({USERS})")
    parser.add_argument("--launcher", choices=("local", "ray"), default="local", help="cluster.launcher (local)")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    quieten()
    with tempfile.TemporaryDirectory() as folder:
        runs = given.runs or [make_run(Path(folder), 3_500)]
        rows = [measure(run, given) for run in runs]
    results.conclude(results.facts(results.command_of("benchmarks.serve", words), rows=rows), report, given.out)


if __name__ == "__main__":
    main()
