"""From the logs of a made-up shop to a ranked file, with the commands that you would type, each timed.

    python examples/own_data.py                                  # 2,000 customers: about a minute
    python examples/own_data.py --users 1000000 --folder big     # a million, for docs/own_data.md

Writes FOLDER/orders/*.parquet, as an export of a shop's data warehouse would look, and runs rec-dist on them with
examples/shop.yaml. Customers keep to two of the shop's departments and often buy what goes with their last purchase, so that there
is something to learn. FOLDER must not exist.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

CONFIG = Path(__file__).with_name("shop.yaml")
ADJECTIVES = ("Classic", "Slim", "Recycled", "Striped", "Soft", "Heavy", "Folding", "Mini", "Outdoor", "Quiet")
MATERIALS = ("Cotton", "Oak", "Steel", "Wool", "Bamboo", "Linen", "Glass", "Leather", "Ceramic", "Cork")
THINGS = ("Shirt", "Lamp", "Chair", "Pan", "Blanket", "Shelf", "Bottle", "Bag", "Mug", "Rug", "Clock", "Tent")
CUSTOMERS_A_FILE = 50_000
FIRST_DAY = np.datetime64("2025-01-01T00:00:00", "s")


def write_orders(folder: Path, users: int) -> int:
    """Writes the orders of `users` customers, 6 to 18 each over a year, and returns their number."""
    rng = np.random.default_rng(0)
    departments, items = len(THINGS), max(50, min(users // 10, 20_000) // len(THINGS))  # products in each department
    names = pa.array([_name(thing, number) for thing in THINGS for number in range(items)])
    orders = 0
    folder.mkdir(parents=True)
    for part, first in enumerate(range(0, users, CUSTOMERS_A_FILE)):
        sizes = rng.integers(6, 19, min(CUSTOMERS_A_FILE, users - first))
        owners = np.repeat(np.arange(len(sizes)), sizes)
        favourites = rng.integers(0, departments, (len(sizes), 2))
        department = favourites[owners, rng.integers(0, 2, len(owners))]
        within = (items * rng.random(len(owners)) ** 2).astype(np.int64)  # some products sell far better than others
        goes_with = (np.roll(within, 1) * 7 + 3) % items
        same = np.concatenate([[False], owners[1:] == owners[:-1]])
        within = np.where(same & (rng.random(len(owners)) < 0.4), goes_with, within)
        product = department * items + within
        seconds = np.sort(rng.integers(0, 365 * 86_400, len(owners)))[np.argsort(rng.random(len(owners)))]
        seconds = seconds[np.lexsort((seconds, owners))]
        table = pa.table(
            {
                "order_id": np.arange(orders, orders + len(owners)),
                "customer_id": pa.array(np.char.add("C", np.char.zfill((owners + first).astype(str), 8))),
                "product_id": pa.array(np.char.add("P-", np.char.zfill(product.astype(str), 6))),
                "product_name": names.take(pa.array(product)),
                "ordered_at": FIRST_DAY + seconds,
            }
        )
        pq.write_table(table.take(pa.array(rng.permutation(len(owners)))), folder / f"part-{part:03d}.parquet")
        orders += len(owners)
    return orders


def _name(thing: str, number: int) -> str:
    """Such as `Soft Oak Chair 12`."""
    adjective, material = ADJECTIVES[number % len(ADJECTIVES)], MATERIALS[number // len(ADJECTIVES) % len(MATERIALS)]
    series = number // (len(ADJECTIVES) * len(MATERIALS))
    return f"{adjective} {material} {thing}{f' {series + 1}' if series else ''}"


def commands(folder: Path) -> list[list[str]]:
    """What a reader of docs/own_data.md would type behind `rec-dist`."""
    here, config, runs = f"vars.folder={folder}", str(CONFIG), folder / "runs"
    return [
        ["prepare", f"{config}:shop", here],
        ["evaluate", f"{config}:shop", here, "evaluate.ranker=popularity"],
        ["train", f"{config}:neighbours", here],
        ["evaluate", str(runs / "neighbours")],
        ["train", f"{config}:sasrec", here],
        ["evaluate", str(runs / "sasrec")],
    ]


def ranking(folder: Path) -> list[str]:
    """The last command: ten products for each customer, by the run that evaluated best."""
    runs = folder / "runs"
    values = {
        name: json.loads((runs / name / "evaluation.json").read_text(encoding="utf-8"))["row"]["metrics"]["ndcg@10"]["value"]
        for name in ("neighbours", "sasrec")
    }
    best = max(values, key=values.__getitem__)
    return ["rank", str(runs / best), "--top-k", "10", "--out", str(folder / "recommendations.parquet")]


def timed(words: list[str], log: Path) -> dict[str, object]:
    """Runs one command in a process of its own, with its tables in `log`. Returns its wall and CPU seconds and its peak memory."""
    began = time.perf_counter()
    with log.open("ab") as file:
        process = subprocess.Popen([sys.executable, "-P", "-m", "rec_dist", *words], stdout=file)
        _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"rec-dist {' '.join(words)} ended with {process.returncode}")
    return {
        "command": f"rec-dist {' '.join(words)}",
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_gb": round(usage.ru_maxrss * 1024 / 1e9, 2),
    }


def main() -> None:
    """Writes the orders, runs the commands, and prints their times as a Markdown table; times.json has them too."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--users", type=int, default=2_000)
    parser.add_argument("--folder", type=Path, default=Path("shop"))
    given = parser.parse_args()
    began = time.perf_counter()
    orders = write_orders(given.folder / "orders", given.users)
    print(f"{orders:,} orders of {given.users:,} customers in {time.perf_counter() - began:.1f} s", file=sys.stderr)
    log = given.folder / "output.txt"
    rows = [timed(words, log) for words in commands(given.folder)]
    rows.append(timed(ranking(given.folder), log))
    (given.folder / "times.json").write_text(json.dumps({"users": given.users, "orders": orders, "rows": rows}, indent=1))
    print("| command | s | CPU s | peak GB |\n|---|---|---|---|")
    for row in rows:
        print(f"| `{row['command']}` | {row['seconds']:,} | {row['cpu_seconds']:,} | {row['peak_gb']} |")


if __name__ == "__main__":
    main()
