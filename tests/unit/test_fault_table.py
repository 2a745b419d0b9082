"""The tables of the fault matrix say what its tests wrote: the last result of each case, and nothing of what did not run."""

import importlib
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
from fault_table import BEGIN, END, main
from real_runs import PLUGIN


def row(fault: str, where: str, rank: Any, *, passed: bool = True, seconds: float = 34.2) -> dict[str, Any]:
    outcome = "same parameters" if passed else ""
    name = f"{fault} {where} {rank}"
    return {
        "fault": fault,
        "where": where,
        "rank": rank,
        "restarts": 1,
        "outcome": outcome,
        "seconds": seconds,
        "passed": passed,
        "test": name,
    }


def test_the_last_result_of_each_case(tmp_path: Path) -> None:
    rows = [
        row("SIGKILL", "in a step", 0, passed=False),
        row("SIGKILL", "in a step", 1),
        row("SIGKILL", "in a step", 0, seconds=51.0),
        row("exception", "in a step", 1, passed=False),
        row("SIGKILL", "the driver", ""),
    ]
    source, document = tmp_path / "found.jsonl", tmp_path / "page.md"
    source.write_text("".join(json.dumps(entry) + "\n" for entry in rows), encoding="utf-8")
    document.write_text(f"above\n{BEGIN}\nold\n{END}\nbelow\n", encoding="utf-8")
    main(source, document)
    lines = document.read_text(encoding="utf-8").splitlines()
    assert lines[0] == "above" and lines[-1] == "below" and "old" not in lines
    assert "3 of 4 cases that ran passed." in lines
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines if line.startswith("|")]
    assert ["in a step", "SIGKILL", "same, 1 restart, 51 s", "same, 1 restart, 34 s"] in cells
    assert ["in a step", "exception", "not run", "FAILED, 1 restart, 34 s"] in cells
    assert ["SIGKILL", "the driver", "same parameters", "34"] in cells
    assert lines[-3].startswith("`make test-faults`, 2")


def test_a_page_without_the_marks_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "found.jsonl").write_text(json.dumps(row("SIGKILL", "the driver", "")) + "\n", encoding="utf-8")
    (tmp_path / "page.md").write_text("nothing", encoding="utf-8")
    with pytest.raises(AssertionError, match="lacks the marks"):
        main(tmp_path / "found.jsonl", tmp_path / "page.md")
    assert (tmp_path / "page.md").read_text(encoding="utf-8") == "nothing"


def test_every_place_of_a_fault_is_in_the_package() -> None:
    """A place that was renamed would show in the fault matrix alone, which takes an hour."""
    spec = importlib.util.spec_from_file_location("fault_plugin", PLUGIN / "sitecustomize.py")
    assert spec is not None and spec.loader is not None
    plugin = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(plugin)
    for module, owner, function, _ in plugin.PLACES.values():
        holder = importlib.import_module(module)
        if function is not None:  # else the import itself is the place
            assert callable(getattr(getattr(holder, owner) if owner else holder, function))
