"""`rec-dist prepare` at growing sizes: time and peak memory a row, on synthetic interactions.

    python -m benchmarks.prepare --out prepare.json                      1, 10, 50 million rows on Ray: about 3 minutes, 2 cores
    python -m benchmarks.prepare --rows 1000000 10000000 --on disk       in one process, through files
    python -m benchmarks.prepare --markdown prepare.json                 the tables of a result file

Rows are RecBole's (user, item, rating, time), in time order over all users, 100 a user, so each block of the file holds
nearly every user. Ratings of 4 and more are positives; 5-core on users and items, global temporal split, 8 shards. Memory is
that of the command and of all processes it starts, including Ray's: the sum of proportional set sizes (Pss), read every half
second. Pages of mapped files count while they are resident. A run needs about 200 bytes of disk a row, in --folder.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from benchmarks import results
from benchmarks.peer_targets import Verdict

NUM_ITEMS, ROWS_A_USER, CHUNK = 50_000, 100, 1_000_000
POLL_SECONDS = 0.5


def write_synthetic(folder: Path, rows: int) -> None:
    """Writes log.inter and log.item: users alike, items by a power law, ascending timestamps with ties.

    Below a million rows there are fewer items.
    """
    rng = np.random.default_rng(0)
    num_items = min(NUM_ITEMS, max(rows // 20, 1))
    words = np.asarray(["".join(rng.choice(list("aeioulnrstdm"), size=rng.integers(3, 9))) for _ in range(800)])
    titles = [" ".join(rng.choice(words, size=4)).title() + f" {number}" for number in range(num_items)]
    names = "".join(f"i{number}\t{title}\n" for number, title in enumerate(titles))
    (folder / "log.item").write_text("item_id:token\ttitle:token_seq\n" + names, encoding="utf-8")
    options = pyarrow.csv.WriteOptions(include_header=False, delimiter="\t", quoting_style="none")
    with (folder / "log.inter").open("wb") as file:
        file.write(b"user_id:token\titem_id:token\trating:float\ttimestamp:float\n")
        for begin in range(0, rows, CHUNK):
            size = min(CHUNK, rows - begin)
            columns = {
                "user": np.char.add("u", rng.integers(0, max(rows // ROWS_A_USER, 1), size).astype(str)),
                "item": np.char.add("i", (num_items * rng.random(size) ** 2).astype(np.int64).astype(str)),
                "rating": rng.integers(1, 6, size),
                "timestamp": 1_500_000_000 + (begin + np.arange(size)) // 3,
            }
            pyarrow.csv.write_csv(pa.table(columns), file, options)


def tree(root: int) -> list[int]:
    """The ids of a process and of all its descendants."""
    children: dict[int, list[int]] = {}
    for entry in Path("/proc").iterdir():
        if entry.name.isdigit():
            try:
                parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            except (OSError, IndexError):
                continue  # it has ended in the meantime
            children.setdefault(parent, []).append(int(entry.name))
    found, queue = [], [root]
    while queue:
        found.append(queue.pop())
        queue += children.get(found[-1], [])
    return found


def resident_bytes(pids: list[int]) -> int:
    """The sum of the processes' proportional set sizes: a page that n of them share counts 1/n in each."""
    total = 0
    for pid in pids:
        try:
            lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        except OSError:
            continue
        total += sum(int(line.split()[1]) << 10 for line in lines if line.startswith("Pss:"))
    return total


@contextmanager
def watched(process: subprocess.Popen[str]) -> Iterator[list[int]]:
    """Gives the resident bytes of a process and its descendants, every half second until it has ended, which must be inside."""
    found = [0]

    def watch() -> None:
        while process.poll() is None:
            found.append(resident_bytes(tree(process.pid)))
            time.sleep(POLL_SECONDS)

    thread = threading.Thread(target=watch)
    thread.start()
    yield found
    thread.join()


def prepare(folder: Path, on: str) -> dict[str, Any]:
    """Runs the command on folder/log.inter in a process of its own and measures it. steps: when each step was announced."""
    config = folder / "config.yaml"
    data = {
        "source": str(folder / "log.inter"),
        "path": str(folder / "out"),
        "min_rating": 4.0,
        "min_user_interactions": 5,
        "min_item_interactions": 5,
        "num_shards": 8,
        "prepare_on": on,
    }
    config.write_text(json.dumps({"data": data, "train": {"run_dir": str(folder / "run")}}), encoding="utf-8")
    command = [sys.executable, "-m", "rec_dist", "prepare", str(config)]
    began = time.perf_counter()
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONUNBUFFERED": "1"})
    assert process.stderr is not None
    steps, said = [], []
    with watched(process) as memory:
        for line in process.stderr:
            said.append(line)
            steps.append({"seconds": time.perf_counter() - began, "line": line.strip()})
        process.wait()
        process.stderr.close()
        seconds = time.perf_counter() - began
    if process.returncode:
        raise SystemExit("".join(said))
    manifest = json.loads((folder / "out" / "manifest.json").read_text(encoding="utf-8"))
    return {
        "seconds": seconds,
        "peak_bytes": max(memory),
        "source_bytes": (folder / "log.inter").stat().st_size,
        "fingerprint": manifest["fingerprint"],
        "counts": manifest["counts"],
        "steps": steps,
    }


def run(sizes: list[int], on: str, folder: Path | None) -> dict[str, Any]:
    """Measures every size in a temporary folder inside `folder`."""
    rows = []
    for size in sizes:
        place = Path(tempfile.mkdtemp(dir=folder))
        try:
            write_synthetic(place, size)
            rows.append({"rows": size, "on": on, **prepare(place, on)})
            print(report_rows(rows[-1:]), file=sys.stderr, flush=True)
        finally:
            shutil.rmtree(place)
    return {"rows": rows}


def report_rows(rows: list[dict[str, Any]], *, markdown: bool = False) -> str:
    """Time and memory, in total and a row."""
    shown = [
        {
            "rows": f"{row['rows']:,}",
            "on": row["on"],
            "seconds": row["seconds"],
            "us a row": row["seconds"] / row["rows"] * 1e6,
            "peak GB": row["peak_bytes"] / 1e9,
            "peak bytes a row": row["peak_bytes"] / row["rows"],
            "users": f"{row['counts']['users']:,}",
            "positives": f"{row['counts']['positives']:,}",
        }
        for row in rows
    ]
    return results.table(shown, markdown=markdown)


def verdicts(rows: list[dict[str, Any]]) -> list[Verdict]:
    """Constant time and memory a row from the smallest size to the largest; 50 million rows within 20 minutes and 8 GB."""
    small, large = min(rows, key=lambda row: row["rows"]), max(rows, key=lambda row: row["rows"])
    growth = small["rows"] / large["rows"] if large["rows"] > small["rows"] else None
    whole = next((row for row in rows if row["rows"] == 50_000_000), None)
    names = f"{large['rows']:,} over {small['rows']:,} rows"
    return [
        Verdict(f"seconds a row, {names}", 1.5, growth and growth * large["seconds"] / small["seconds"], at_least=False),
        Verdict(f"peak bytes a row, {names}", 1.5, growth and growth * large["peak_bytes"] / small["peak_bytes"], at_least=False),
        Verdict("minutes for 50,000,000 rows", 20, whole and whole["seconds"] / 60, at_least=False),
        Verdict("peak GB for 50,000,000 rows", 8, whole and whole["peak_bytes"] / 1e9, at_least=False),
    ]


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""
    tables = [report_rows(result["rows"], markdown=markdown)]
    tables.append(results.table([verdict.row() for verdict in verdicts(result["rows"])], markdown=markdown))
    return "\n\n".join([*tables, results.stamp(result)])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--rows", type=int, nargs="+", default=[1_000_000, 10_000_000, 50_000_000])
    parser.add_argument("--on", choices=["auto", "memory", "disk", "ray"], default="ray")
    parser.add_argument("--folder", type=Path, help="where temporary sources and results are written")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    result = {**results.facts(results.command_of("benchmarks.prepare", words)), **run(given.rows, given.on, given.folder)}
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
