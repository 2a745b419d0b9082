"""Start-up: seconds until `rec-dist --help`, a plan, and the first step of a local training run.

    python -m benchmarks.startup --out startup.json
    python -m benchmarks.startup --markdown startup.json

Each command is a process of its own. Wall time needs two idle cores; "CPU" is user and system time of the process, which other
work beside it changes less. The run trains a random model of width 64 on generated data (cluster.launcher=local) for one step;
"wall" ends when that step's row is in metrics.jsonl, and "CPU" when the process ends, with the model saved. The first repeat
reads libraries from the disk and is not counted. Cost: about 2 minutes on 2 idle cores.
"""

import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks import results
from benchmarks.peer_methods import Shape
from benchmarks.whole_runs import make_inputs
from rec_dist.commands.prepare import prepare
from rec_dist.config.schema import RunConfig
from rec_dist.runtime.quiet import quieten

TINY = Shape(64, 2, 4, 2, 128, 8192)
PLAN = ("plan", "llama3-8b:sdpo", "plan.cluster=8xh100", "plan.model=llama3-8b", "train.max_steps=1000", "data.path=nowhere")
LIMITS = {
    "rec-dist --help": 0.3,
    "rec-dist plan, 8B on 8 H100": 3.0,
    "rec-dist train, to its first step": 8.0,
}  # seconds of wall time


def once(words: Sequence[str], done: Callable[[], bool] | None = None) -> tuple[float, float]:
    """(wall seconds until `done`, or the end without one; CPU seconds of the whole process) of `rec-dist WORDS`."""
    before, began = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
    process = subprocess.Popen([sys.executable, "-m", "rec_dist", *words], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    seen = None
    while done is not None and seen is None and process.poll() is None:
        seen = time.perf_counter() if done() else None
        time.sleep(0.005)
    _, err = process.communicate()
    wall = (seen or time.perf_counter()) - began
    if process.returncode:
        raise SystemExit(f"rec-dist {' '.join(words)} ended with {process.returncode}:\n{err.decode()}")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return wall, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def training(folder: Path) -> Callable[[int], tuple[list[str], Callable[[], bool]]]:
    """Prepares a data set and a model. Returns repeat -> (the words of a run of one step, whether that step is done)."""
    inputs = make_inputs(folder, TINY)
    config = {
        **inputs,
        "task": {"kind": "sft"},
        "train": {"run_dir": "set below", "max_steps": 1, "global_batch_size": 8, "max_tokens_per_micro_batch": 512},
    }
    prepare(RunConfig.model_validate(config))
    path = folder / "config.yaml"
    path.write_text(json.dumps(config), encoding="utf-8")  # JSON is YAML

    def run(repeat: int) -> tuple[list[str], Callable[[], bool]]:
        run_dir = folder / f"run-{repeat}"
        metrics = run_dir / "metrics.jsonl"
        return ["train", str(path), f"train.run_dir={run_dir}"], lambda: metrics.is_file() and '"step": 1,' in metrics.read_text()

    return run


def run(repeats: int) -> list[dict[str, Any]]:
    """A row for each command."""
    rows = []
    with tempfile.TemporaryDirectory(prefix="startup-") as place:
        train = training(Path(place))
        for (name, limit), words in zip(LIMITS.items(), (("--help",), PLAN, None), strict=True):
            times = [once(words) if words is not None else once(*train(repeat)) for repeat in range(1 + repeats)][1:]
            wall, cpu = (results.spread(column) for column in zip(*times, strict=True))
            rows.append({"command": name, "limit": limit, "wall": wall, "cpu": cpu})
    return rows


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the table of a result."""
    rows = [
        {
            "command": row["command"],
            "wall s": f"{row['wall']['median']:.2f} [{row['wall']['low']:.2f}, {row['wall']['high']:.2f}]",
            "CPU s": f"{row['cpu']['median']:.2f} [{row['cpu']['low']:.2f}, {row['cpu']['high']:.2f}]",
            "wall s, target": f"<= {row['limit']:g}",
        }
        for row in result["rows"]
    ]
    return f"{results.table(rows, markdown=markdown)}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--repeats", type=results.positive, default=5)
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    quieten()
    result = results.facts(results.command_of("benchmarks.startup", words), rows=run(given.repeats))
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
