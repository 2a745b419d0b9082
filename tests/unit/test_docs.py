"""The documents describe what exists: every key of the schema, and no missing link, file or make target."""

import re
import shlex
import tomllib
from pathlib import Path

import numpy as np
import pytest

from rec_dist.commands.arguments import parse
from rec_dist.config.compose import locate, runs_of
from rec_dist.config.reference import reference
from rec_dist.config.schema import RunConfig
from rec_dist.models.attention import visible
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.storage.files import sha256

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launchers").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
OF_TODAY = [name for name in NAMES if name not in ("CHANGELOG.md", "docs/LOG.md")]  # these two name things of the past
LINK = re.compile(r"\]\(([^)\s]+)\)")
CONFIG = re.compile(r"\bconfigs/[\w./-]+\.yaml")
MODULE = re.compile(r"`([\w./-]+\.(?:py|sh))`")
SOURCES = [ROOT, ROOT / "rec_dist", ROOT / "kernels"]  # a module may be named relative to any of these, such as training/loop.py
TARGET = re.compile(r"`make ([a-z][a-z0-9-]*)|^(?: {4}|\$ )make ([a-z][a-z0-9-]*)", re.MULTILINE)
_TAKE_CONFIG = "prepare|train|evaluate|run|profile|plan|submit|embed|export-rows|init"
RECIPE = re.compile(rf"rec-dist +(?:{_TAKE_CONFIG}) +([a-z][\w-]*(?::[\w-]+)?)(?=[\s`)])")
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def test_the_reference_of_keys_is_current() -> None:
    """`make docs` regenerates it."""
    assert (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8") == reference()


def test_every_key_stands_in_the_reference_with_its_meaning() -> None:
    rows = dict(re.findall(r"^\| `([\w.\[\]]+)` \|.*\| (.*) \|$", reference(), re.MULTILINE))
    sections = [f"{name}." for name in RunConfig.model_fields]
    assert [section for section in sections if not any(key.startswith(section) for key in rows)] == []
    assert {"task.sequential.width", "submit.slurm.nodes", "pipeline.stages[].do", "matrix", "runs"} <= rows.keys()
    assert [key for key, meaning in rows.items() if len(meaning) < 5] == []


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    links = [link.partition("#")[0] for link in LINK.findall(path.read_text(encoding="utf-8"))]
    relative = [link for link in links if link and "://" not in link and not link.startswith("mailto:")]
    assert [link for link in relative if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", OF_TODAY)
def test_named_configs_recipes_and_modules_exist(name: str) -> None:
    text, roots = (ROOT / name).read_text(encoding="utf-8"), [*SOURCES, (ROOT / name).parent]
    assert sorted(file for file in {*CONFIG.findall(text)} if not (ROOT / file).is_file()) == []
    named = [locate(Path(recipe)) for recipe in {*RECIPE.findall(text)}]
    assert sorted(str(file) for file, run in named if not file.is_file() or run not in (None, *runs_of(file))) == []
    assert sorted(file for file in {*MODULE.findall(text)} if not any((root / file).is_file() for root in roots)) == []


@pytest.mark.parametrize("name", NAMES)
def test_named_make_targets_exist(name: str) -> None:
    text = (ROOT / name).read_text(encoding="utf-8")
    named = {target for pair in TARGET.findall(text) for target in pair if target}
    for block in FENCED.findall(text):
        named |= set(re.findall(r"^(?:\$ )?make ([a-z][a-z0-9-]*)", block, re.MULTILINE))
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert sorted(named - set(re.findall(r"^([a-z][a-z0-9-]*):", makefile, re.MULTILINE))) == []


def test_the_licence_is_the_one_that_the_package_names() -> None:
    """The text of https://www.apache.org/licenses/LICENSE-2.0.txt, byte for byte; an image has it before the package is built."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert (project["license"], project["license-files"]) == ("Apache-2.0", ["LICENSE"])
    published = "cfc7749b96f63bd31c3c42b5c471bf756814053e847c10f3eb003417bc523d30"
    assert sha256(ROOT / "LICENSE") == published
    before_install, _, _ = (ROOT / "Dockerfile").read_text(encoding="utf-8").partition("pip install -c constraints.txt '.[")
    assert re.search(r"^COPY .*\bLICENSE\b", before_install, re.MULTILINE)


@pytest.mark.parametrize("name", OF_TODAY)
def test_named_commands_have_these_arguments(name: str) -> None:
    for block in re.findall(r"^```bash\n(.*?)^```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL):
        for line in re.findall(r"^rec-dist (?!submit CONFIG.yaml --to ray\|).*", block.replace("\\\n", " "), re.MULTILINE):
            words = shlex.split(re.split(r" [|>&;]", line)[0], comments=True)[1:]
            parse(words, "0")  # raises UserError


def test_every_event_of_metrics_jsonl_is_described() -> None:
    sources = [path.read_text(encoding="utf-8") for path in (ROOT / "rec_dist").rglob("*.py")]
    events = {event for source in sources for event in re.findall(r'"event": "(\w+)"', source)}
    text = (ROOT / "docs" / "metrics.md").read_text(encoding="utf-8")
    assert "step" in events
    assert sorted(event for event in events if f"`{event}`" not in text) == []


def test_the_worked_example_is_what_packing_computes() -> None:
    text = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
    section = text.partition("### A worked example")[2].partition("\n## ")[0].replace("|", " ")

    def numbers(label: str) -> list[int]:
        found = re.search(rf"^(?:.* )?{label}\s+((?:-?\d+\s+)*-?\d+)", section, re.MULTILINE)
        assert found, f"the worked example lacks {label}"
        return [int(word) for word in found[1].split()]

    fields = ("tokens", "branch_points", "group_sizes", "completion_inputs", "input_lengths", "lengths", "targets")
    values = {field: np.asarray(numbers(field), dtype=np.int32) for field in fields}
    prompt = GroupedPrompt(keys=np.asarray([1, 2], dtype=np.int64), **values)  # type: ignore[arg-type]
    batch = pack_prompts([prompt])
    for field in ("input_ids", "positions", "completion_ids", "limits", "targets", "rows", "completion_offsets", "group_offsets"):
        assert getattr(batch, field).tolist() == numbers(field), field
    drawn = [[mark == "x" for mark in row] for row in re.findall(r"^ ?\d+ ([x.]{13})(?: |$)", section, re.MULTILINE)]
    assert visible(batch).reshape(13, 13).tolist() == drawn
    assert (batch.num_tokens, batch.num_logical_tokens) == (13, 38)
