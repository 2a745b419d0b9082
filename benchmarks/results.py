"""What all benchmarks share: when and where a result was made, medians with their spread, tables, JSON."""

import argparse
import datetime
import json
import os
import platform
import shlex
import statistics
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from rec_dist.runtime.environment import describe
from rec_dist.runtime.quiet import quieten

Row = Mapping[str, Any]
Report = Callable[..., str]  # (result, *, markdown) -> its tables


def facts(command: str, **more: Any) -> dict[str, Any]:
    """Date, commit, machine, versions and the command that reproduces this result."""
    about = describe()
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": about["commit"],
        "machine": {**about["hardware"], "python": platform.python_version()},
        "versions": about["versions"],
        "command": command,
        **more,
    }


def command_of(module: str, arguments: Sequence[str]) -> str:
    """The command line as a reader would type it, without --out."""
    kept = list(arguments)
    if "--out" in kept:
        place = kept.index("--out")
        del kept[place : place + 2]
    return shlex.join(["python", "-m", module, *kept])


def parser_of(doc: str | None) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark has."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=_new_file, help="result file")
    parser.add_argument("--markdown", type=Path, help="render a result file; measure nothing")
    return parser


def rendered(parser: argparse.ArgumentParser, given: argparse.Namespace, report: Report) -> bool:
    """Prints the tables of a file and returns True if --markdown asks for that. Exits with code 2 if it cannot read the file."""
    if given.markdown is None:
        return False
    try:
        tables = report(read_result(given.markdown), markdown=True)
    except (KeyError, TypeError, AttributeError, IndexError, StopIteration) as fault:  # from another benchmark, or incomplete
        parser.error(f"--markdown: {given.markdown} is not a result file of this benchmark: {fault!r}")
    except (OSError, ValueError) as fault:
        parser.error(f"--markdown: {given.markdown} is not a result file: {fault}")
    print(tables)
    return True


def read_result(path: Path) -> dict[str, Any]:
    """Reads what `write` wrote.

    Raises OSError or ValueError if it is not readable JSON or does not say where it was made.
    """
    result = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(result, dict) or not {"date", "commit", "machine", "command", "rows"} <= result.keys():
        raise ValueError("it has no date, commit, machine, command and rows")
    return result


def positive(text: str) -> int:
    """Parses a whole number of 1 or more."""
    try:
        number = int(text)
    except ValueError:
        number = 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 1 or more")
    return number


def _new_file(text: str) -> Path:
    """Parses the path of a file that can be written later: measuring may take hours."""
    path = Path(text)
    if path.is_dir() or not os.access(path.absolute().parent, os.W_OK):
        raise argparse.ArgumentTypeError(f"{text!r} cannot be written; name a file in an existing, writable folder")
    return path


def plan_rows(module: str, doc: str | None, rows: Callable[[], Any], report: Report, arguments: list[str] | None) -> None:
    """Runs a benchmark that only plans: prints its tables and writes a file if --out is given."""
    parser = parser_of(doc)
    given = parser.parse_args(arguments)
    if rendered(parser, given, report):
        return
    quieten()
    words = sys.argv[1:] if arguments is None else arguments
    conclude(facts(command_of(module, words), rows=rows()), report, given.out)


def conclude(result: Mapping[str, Any], report: Report, out: Path | None) -> None:
    """Writes the file if `out` is given, and prints the tables."""
    if out:
        write(out, result)
    print(report(result))


def spread(values: Sequence[float]) -> dict[str, float]:
    """median, low and high of repeats."""
    return {"median": statistics.median(values), "low": min(values), "high": max(values), "n": len(values)}


def table(rows: Sequence[Row], *, markdown: bool = False) -> str:
    """An aligned table with the columns of the first row. Numbers are shown with 3 digits unless they are text already."""
    if not rows:
        return "(no rows)"
    names = list(rows[0])
    cells = [names, *([_text(row.get(name, "")) for name in names] for row in rows)]
    widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
    padded = [[cell.ljust(width) for cell, width in zip(line, widths, strict=True)] for line in cells]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = ["-" * width for width in widths]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def write(path: Path, value: Mapping[str, Any]) -> None:
    """Writes pretty JSON, whole or not at all."""
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(value, indent=1) + "\n", encoding="utf-8")
    temporary.rename(path)


def stamp(result: Row) -> str:
    """The line below a table: command, date, commit, machine."""
    machine = result["machine"]
    name = ", ".join(machine.get("gpus") or []) or f"{machine['cpu']}, {machine['cpus']} cores"
    commit, *changed = str(result["commit"]).partition("+")  # "+changes": files that are in no commit
    return f"`{result['command']}`, {result['date'][:10]}, commit {commit[:9]}{''.join(changed)}, {name}"


def run_apart(module: str, arguments: Sequence[str], **options: Any) -> subprocess.Popen[str]:
    """Starts a child process of this interpreter that exchanges JSON lines."""
    return subprocess.Popen(
        [sys.executable, "-m", module, *arguments], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, **options
    )
