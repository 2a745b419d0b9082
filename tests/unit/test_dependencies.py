"""What is installed: the versions that were tested, what the container gets, and the table of when the long suites passed."""

import json
import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path
from typing import Any

import pytest
from hashed_requirements import requirements
from packaging.specifiers import SpecifierSet
from suite_table import BEGIN, END, row_of, with_row

from rec_dist.runtime import environment
from rec_dist.storage.files import sha256

ROOT = Path(__file__).resolve().parents[2]


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    return dict(line.split("==") for line in lines if "==" in line and not line.startswith("#"))


def test_libraries_with_private_names_have_their_pins_and_an_upper_bound() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    ranges = {re.match(r"[\w-]+", text)[0]: re.sub(r"^[\w-]+(\[.*\])?", "", text) for text in project["dependencies"]}  # type: ignore[index]
    for name, tested in environment._PRIVATE_NAMES_OF.items():
        assert pins()[name] == tested, f"constraints.txt and runtime/environment.py disagree on {name}"
        allowed = SpecifierSet(ranges[name])
        major, minor, *_ = map(int, tested.split("."))
        assert tested in allowed and f"{major}.{minor + 1}" not in allowed, f"{name}{ranges[name]}"


def test_other_versions_are_one_line_at_the_start(monkeypatch: pytest.MonkeyPatch) -> None:
    found = dict(environment._PRIVATE_NAMES_OF)
    monkeypatch.setattr(environment, "_version", found.get)
    assert environment.untested() is None
    found["peft"] = "0.21.9"
    assert environment.untested() is None, "another patch"
    found["ray"] = "2.61.0"
    del found["deepspeed"]
    line = environment.untested()
    assert line is not None and len(line.splitlines()) == 1
    assert "ray: tested with 2.60.0, found 2.61.0; deepspeed: tested with 0.19.8, found none." in line and "peft" not in line


def test_the_container_runs_as_a_user_and_has_no_tools_of_developers() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert re.search(r"^USER [1-9]\d*$", text, re.MULTILINE), "a number, which Kubernetes can tell from root"
    assert text.index("\nUSER ") < text.index("\nENTRYPOINT ")
    installs = re.findall(r"pip install[^;&\n]*", text)
    assert installs and not [line for line in installs if "dev" in line]


def test_every_installation_for_users_has_the_same_extras() -> None:
    """The README's, the Makefile's, the container's, and the one whose hashes it may check."""
    found = {}
    for name in ("README.md", "Makefile", "Dockerfile", "launchers/hashed_requirements.py"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("$(comma)", ",")
        found[name] = set(re.findall(r"\.\[(?:[^]]*dev,)?([a-z,]+)\)?\]", text))
    assert set(map(frozenset, found.values())) == {frozenset({"gguf,serve"})}, found


def test_quickstart_installs_for_users_and_test_for_developers() -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    needs = dict(re.findall(r"^([a-z][a-z0-9-]*): ?([a-z-]*)", makefile, re.MULTILINE))
    assert {needs[name] for name in ("quickstart", "quickstart-dmpo", "sdpo", "delrec", "p2rec", "dmpo")} == {"install"}
    assert {needs[name] for name in ("test", "test-slow", "test-faults", "test-fast", "test-launch", "lint", "docs")} == {
        "install-dev"
    }


def test_requirements_have_the_hash_of_each_file(tmp_path: Path) -> None:
    """Of pip's own report on a wheel that is made here."""
    wheel = tmp_path / "tiny_thing-1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("tiny_thing-1.2.dist-info/METADATA", "Metadata-Version: 2.1\nName: Tiny_Thing\nVersion: 1.2\n")
        archive.writestr("tiny_thing-1.2.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr("tiny_thing-1.2.dist-info/RECORD", "")
    words = ["install", "--dry-run", "--ignore-installed", "--quiet", "--no-index", "--report", "-", str(wheel)]
    done = subprocess.run([sys.executable, "-m", "pip", *words], capture_output=True, text=True, check=True)
    report: dict[str, Any] = json.loads(done.stdout)
    assert requirements(report) == [f"tiny_thing==1.2 --hash=sha256:{sha256(wheel)}"]
    report["install"].append(
        {"download_info": {"url": "file:///x", "dir_info": {}}, "metadata": {"name": "rec-dist", "version": "1"}}
    )
    assert len(requirements(report)) == 1, "not the project itself"
    report["install"][0]["download_info"]["archive_info"] = {}
    with pytest.raises(ValueError, match="no SHA-256 of Tiny_Thing"):
        requirements(report)


def test_a_suite_that_passed_is_noted_and_one_that_failed_is_not(tmp_path: Path) -> None:
    junit = tmp_path / "suite.xml"
    write = lambda failures: junit.write_text(
        f'<testsuites><testsuite tests="9" failures="{failures}" errors="0" skipped="2" time="610.2"></testsuite></testsuites>'
    )
    write(0)
    row = row_of("test-slow", junit)
    assert row is not None and re.match(
        r"\| `make test-slow` \| \d{4}-\d\d-\d\d \| \S+ \| 7 passed, 2 skipped, 10 minutes \| ", row
    )
    text = f"before\n{BEGIN}\n{END}\nafter\n"
    once = with_row(text, row)
    assert once.startswith(f"before\n{BEGIN}\n| command |") and once.endswith(f"{END}\nafter\n") and row in once
    other = row.replace("test-slow", "test-faults")
    twice = with_row(with_row(once, other), row.replace("7 passed", "8 passed"))
    assert twice.count("`make test-slow`") == 1 and "8 passed" in twice and other in twice
    write(1)
    assert row_of("test-slow", junit) is None
