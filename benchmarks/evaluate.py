"""`rec-dist evaluate` of popularity over a whole catalogue: seconds, and the memory at two numbers of questions.

    python -m benchmarks.evaluate --out evaluate.json
    python -m benchmarks.evaluate --questions 50000 200000
    python -m benchmarks.evaluate --markdown evaluate.json

Popularity costs next to nothing, so what is left is the questions, their candidates and scores, and predictions.arrow. A user has
eight items, the last of which is asked about. Each command is a process of its own. "peak" is the largest resident memory of the
process. Cost: 8 bytes a question and item on the disk, and 10 s of CPU for 10,000 questions of 5,000 items.
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks import results
from benchmarks.rank import measured
from rec_dist.commands.prepare import prepare
from rec_dist.config.paths import pinned
from rec_dist.config.schema import RunConfig
from rec_dist.config.yaml_text import to_yaml
from rec_dist.runtime.quiet import quieten

_LENGTH = 8  # items of a user


def make_config(folder: Path, num_questions: int, num_items: int) -> Path:
    """Writes and prepares a data set with a question of each user, and the configuration of its evaluation."""
    source, rng = folder / "rows.csv", np.random.default_rng(0)
    with source.open("w", encoding="utf-8") as file:
        file.write("user,item,timestamp\n")
        for user in range(num_questions):
            first = int(rng.integers(num_items)) if user * _LENGTH >= num_items else user * _LENGTH
            file.writelines(f"{user},i{(first + step) % num_items},{step}\n" for step in range(_LENGTH))
    config = RunConfig.model_validate(
        {
            "data": {"source": str(source), "path": str(folder / "data"), "split": "leave_one_out"},
            "evaluate": {"ranker": "popularity", "num_candidates": "all"},
            "train": {"run_dir": str(folder / "run")},
        }
    )
    prepare(pinned(config))
    source.unlink()
    path = folder / "config.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    return path


def run_all(questions: Sequence[int], num_items: int) -> list[dict[str, Any]]:
    """A row for each number of questions."""
    rows = []
    for num in questions:
        with tempfile.TemporaryDirectory(prefix="evaluate-") as place:
            config = make_config(Path(place), num, num_items)
            rows.append({"items": num_items, "questions": num, **measured("evaluate", str(config))})
            print(rows[-1], file=sys.stderr, flush=True)
    return rows


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the table of a result."""
    rows = [
        {
            "items": f"{row['items']:,}",
            "questions": f"{row['questions']:,}",
            "wall s": f"{row['seconds']:.1f}",
            "CPU s": f"{row['cpu_seconds']:.1f}",
            "peak MiB": f"{row['peak_bytes'] / 2**20:,.0f}",
        }
        for row in result["rows"]
    ]
    return f"{results.table(rows, markdown=markdown)}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--questions", type=results.positive, nargs="+", default=[10_000, 20_000], help="ascending")
    parser.add_argument("--items", type=results.positive, default=5_000, help="of the catalogue (5000)")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    quieten()
    rows = run_all(given.questions, given.items)
    results.conclude(results.facts(results.command_of("benchmarks.evaluate", words), rows=rows), report, given.out)


if __name__ == "__main__":
    main()
