"""Every shell script passes shellcheck: those in the repository, and rendered ones."""

import subprocess
import sys
from pathlib import Path

import pytest
from test_rendering import GOLDEN, ROOT, rendered

SCRIPTS = sorted([*(ROOT / "launchers").glob("*.sh"), *(ROOT / "rec_dist").rglob("*.sh")])


def shellcheck(path: Path) -> str:
    """The faults that shellcheck finds. SC1091 is excluded: it complains about the user's files that are not here."""
    command = [str(Path(sys.executable).with_name("shellcheck")), "--shell=bash", "--exclude=SC1091", str(path)]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.name)
def test_a_script_of_ours(path: Path) -> None:
    assert shellcheck(path) == ""


@pytest.mark.parametrize("name", [name for name in sorted(GOLDEN) if name.startswith("slurm")])
def test_a_rendered_script(name: str, tmp_path: Path) -> None:
    script = tmp_path / "job.sbatch"
    script.write_text(rendered(*GOLDEN[name]), encoding="utf-8")
    assert shellcheck(script) == ""


@pytest.mark.parametrize("name", ["node.sh", "driver.sh"])
def test_what_a_batch_script_writes_for_the_nodes(name: str, tmp_path: Path) -> None:
    """The two scripts inside it: the text of their here-documents, with the function that is declared above it."""
    mark = {"node.sh": "NODE", "driver.sh": "DRIVER"}[name]
    body = rendered("slurm").partition(f"<< '{mark}'\n")[2].partition(f"\n{mark}\n")[0]
    script = tmp_path / name
    script.write_text(f"#!/bin/bash\n# shellcheck disable=SC2154\nsetup() {{ :; }}\n{body}\n", encoding="utf-8")
    assert shellcheck(script) == ""


def test_shellcheck_finds_a_fault(tmp_path: Path) -> None:
    script = tmp_path / "bad.sh"
    script.write_text("#!/bin/bash\nrm -rf $1/*\n", encoding="utf-8")
    assert "SC2086" in shellcheck(script)
