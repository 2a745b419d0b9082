"""What Ray Data's own pipeline of read, hash shuffle by user, sort and write costs, beside all of `rec-dist prepare` on Ray.

    python -m benchmarks.prepare_ray_data --out ray_data.json              10 million rows, in turns: about 4 minutes on 2 cores
    python -m benchmarks.prepare_ray_data --rows 50000000 --ways ray-data
    python -m benchmarks.prepare_ray_data --markdown ray_data.json

The rows are those of benchmarks/prepare.py. Ray Data reads the file with its own reader of csv, partitions the rows by the hash of
the user through the disk of the machine, sorts each partition by user and time, and writes Parquet. It does no more: it checks and
cleans nothing, knows no line of a row, keeps no order of ties, and filters nothing. `rec-dist prepare` does all of that. So where it
is not slower, the shuffle of Ray Data has nothing to give. "CPU s" is the time of all processes, Ray's among them; "peak" is the sum
of their proportional set sizes.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.prepare import prepare, watched, write_synthetic

WAYS = ("ray-data", "prepare")
PARTITIONS = 8


def pipeline(source: str, target: str) -> None:
    """Ray Data's part, in the process that --child starts."""
    import pyarrow as pa
    import pyarrow.csv
    import ray
    from ray.data import DataContext

    ray.init(address="local", include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    context = DataContext.get_current()
    context.enable_progress_bars = False
    context.use_disk_based_hash_shuffle = True
    rows = ray.data.read_csv(source, parse_options=pyarrow.csv.ParseOptions(delimiter="\t"), file_extensions=None)
    shuffled = rows.repartition(PARTITIONS, keys=["user_id:token"])

    def ordered(table: pa.Table) -> pa.Table:
        return table.sort_by([("user_id:token", "ascending"), ("timestamp:float", "ascending")])

    shuffled.map_batches(ordered, batch_format="pyarrow", batch_size=None).write_parquet(target)


def measured(command: list[str]) -> dict[str, Any]:
    """Runs a command; its seconds, and the peak bytes of it and all its descendants. Raises SystemExit if it fails."""
    began = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    with watched(process) as memory:
        said, _ = process.communicate()
    if process.returncode:
        raise SystemExit(said[-3000:])
    return {"seconds": time.perf_counter() - began, "peak_bytes": max(memory)}


def busy_seconds() -> float:
    """CPU seconds that all processes of the machine have taken."""
    ticks = [int(number) for number in Path("/proc/stat").read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    return (sum(ticks) - ticks[3] - ticks[4]) / os.sysconf("SC_CLK_TCK")


def run(rows: int, ways: list[str], folder: Path | None) -> dict[str, Any]:
    """Measures each way on one file, in turns."""
    place, found = Path(tempfile.mkdtemp(dir=folder)), []
    try:
        write_synthetic(place, rows)
        for way in ways:
            busy = busy_seconds()
            if way == "prepare":
                row = prepare(place, "ray")
            else:
                source, target = str(place / "log.inter"), str(place / "parquet")
                row = measured([sys.executable, "-m", "benchmarks.prepare_ray_data", "--child", source, target])
            found.append({"way": way, "rows": rows, "cpu_seconds": busy_seconds() - busy, **row})
            print(found[-1], file=sys.stderr, flush=True)
    finally:
        shutil.rmtree(place)
    return {"rows": found}


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """A row for each way."""
    table = [
        {
            "way": row["way"],
            "rows": f"{row['rows']:,}",
            "seconds": row["seconds"],
            "CPU s": row["cpu_seconds"],
            "peak GB": row["peak_bytes"] / 1e9,
        }
        for row in result["rows"]
    ]
    return "\n\n".join([results.table(table, markdown=markdown), results.stamp(result)])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--rows", type=results.positive, default=10_000_000)
    parser.add_argument("--ways", choices=WAYS, nargs="+", default=list(WAYS))
    parser.add_argument("--folder", type=Path, help="where temporary sources and results are written")
    parser.add_argument("--child", nargs=2, help="internal: SOURCE TARGET of Ray Data's pipeline")
    given = parser.parse_args(words)
    if given.child:
        pipeline(*given.child)
        return
    if results.rendered(parser, given, report):
        return
    measured_rows = run(given.rows, given.ways, given.folder)
    result = {**results.facts(results.command_of("benchmarks.prepare_ray_data", words)), **measured_rows}
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
