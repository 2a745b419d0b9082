"""The documents say what is there: every key of the schema, and no link, file or make target that does not exist."""

import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import pytest
from pydantic import BaseModel
from pydantic.fields import FieldInfo

from rec_dist.commands.run import PipelineConfig
from rec_dist.config.schema import RunConfig
from rec_dist.storage.files import sha256

ROOT = Path(__file__).resolve().parents[2]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md"), *(ROOT / "launchers").glob("*.md")])
NAMES = [str(path.relative_to(ROOT)) for path in DOCUMENTS]
LINK = re.compile(r"\]\(([^)\s]+)\)")
CONFIG = re.compile(r"\bconfigs/[\w.-]+\.yaml")
MODULE = re.compile(r"`([\w./-]+\.(?:py|sh))`")
SOURCES = [ROOT, ROOT / "rec_dist", ROOT / "kernels"]  # a module is named from any of them, such as training/loop.py
TARGET = re.compile(r"`make ([a-z][a-z0-9-]*)|^(?: {4}|\$ )make ([a-z][a-z0-9-]*)", re.MULTILINE)
FENCED = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def values_of(annotation: Any) -> str:
    """The values that a key takes, as a reader of YAML writes them."""
    if get_origin(annotation) is Annotated:
        return values_of(get_args(annotation)[0])
    if get_origin(annotation) is Literal:
        return ", ".join(f"`{value}`" for value in get_args(annotation))
    if get_origin(annotation) in (Union, UnionType):
        return ", ".join(values_of(part) for part in get_args(annotation))
    if get_origin(annotation) is tuple:
        inner = [part for part in get_args(annotation) if part is not Ellipsis]
        return f"{len(inner)} of: {values_of(inner[0])}"
    if get_origin(annotation) is list:
        return f"list of: {values_of(get_args(annotation)[0])}"
    if get_origin(annotation) is dict:
        return "mapping of text to text"
    names = {str: "text", int: "whole number", float: "number", bool: "`true`, `false`", NoneType: "`null`"}
    return names.get(annotation, "section")


def limits_of(field: FieldInfo) -> str:
    signs = {"ge": ">=", "gt": ">", "le": "<=", "lt": "<"}
    found = [f"{sign} {getattr(entry, name)}" for entry in field.metadata for name, sign in signs.items() if hasattr(entry, name)]
    return f" ({', '.join(found)})" if found else ""


def default_of(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    value = field.get_default(call_default_factory=True)
    plain = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return f"`{plain[value]}`"
    if isinstance(value, str):
        return "`" + value.replace("\n", "\\n") + "`"
    if isinstance(value, tuple | list):
        return f"`[{', '.join(str(entry) for entry in value)}]`"
    return f"`{value}`"


def inner_models(annotation: Any) -> list[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    return [model for part in get_args(annotation) for model in inner_models(part)]


def reference_rows(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """The rows of docs/configuration.md: key, default, values, meaning. A list of sections has its keys under `name[]`."""
    for name, field in model.model_fields.items():
        inner = inner_models(field.annotation)
        if inner:
            mark = "[]" if get_origin(field.annotation) is list else ""
            yield from reference_rows(inner[0], f"{prefix}{name}{mark}.")
        else:
            values = values_of(field.annotation).replace("number", f"number{limits_of(field)}", 1)
            meaning = re.sub("(?<!`)<", "&lt;", field.description or "")  # else Markdown takes <run_dir> for a tag
            yield f"| `{prefix}{name}` | {default_of(field)} | {values} | {meaning} |"


@pytest.mark.parametrize("model", [RunConfig, PipelineConfig])
def test_every_key_stands_in_the_reference_as_it_is(model: type[BaseModel]) -> None:
    lines = set((ROOT / "docs" / "configuration.md").read_text(encoding="utf-8").splitlines())
    missing = [row for row in reference_rows(model) if row not in lines]
    assert not missing, "docs/configuration.md lacks these rows, or has others in their place:\n" + "\n".join(missing)


def test_the_reference_has_no_key_that_is_gone() -> None:
    rows = {row for model in (RunConfig, PipelineConfig) for row in reference_rows(model)}
    text = (ROOT / "docs" / "configuration.md").read_text(encoding="utf-8")
    assert [line for line in text.splitlines() if re.match(r"\| `\w+(\[\])?\.", line) and line not in rows] == []


@pytest.mark.parametrize("name", NAMES)
def test_relative_links_lead_somewhere(name: str) -> None:
    path = ROOT / name
    links = [link.partition("#")[0] for link in LINK.findall(path.read_text(encoding="utf-8"))]
    relative = [link for link in links if link and "://" not in link and not link.startswith("mailto:")]
    assert [link for link in relative if not (path.parent / link).exists()] == []


@pytest.mark.parametrize("name", NAMES)
def test_named_configs_and_modules_exist(name: str) -> None:
    text, roots = (ROOT / name).read_text(encoding="utf-8"), [*SOURCES, (ROOT / name).parent]
    assert sorted(file for file in {*CONFIG.findall(text)} if not (ROOT / file).is_file()) == []
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
