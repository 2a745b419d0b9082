"""Writes docs/promises.md: every promise of the documents with the test that holds it, and what runs that test.

    python tests/promises.py > docs/promises.md

The promises stand in the tables of the documents themselves, next to what they are about: any table whose second column is headed
`held by` or `test`. `make docs` writes the page, and tests/unit/test_promises.py says when it is out of date, when a row names no
test, and when a test that a row names is not there. Cost: parsing the named test files.
"""

import ast
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
SOURCES = ("docs/architecture.md", "docs/reliability.md", "docs/security.md", "docs/clusters.md")
_HEADS = ("held by", "test")
_TEST = re.compile(r"`(tests/[\w/]+\.py)(?:::(\w+))?`")
_HEAD = """# Promises

Every promise of the documents with the test that holds it, and the command that runs the test.
`make docs` writes this page from the tables of {sources}.
The tests fail when a row has no test or names one that is not there.
[reliability.md](reliability.md#when-the-tests-last-passed) says when the longer suites last passed.
"""


@dataclass(frozen=True)
class Promise:
    """A row of a table. document: where it stands; tests: (file, function), function None for all tests of the file."""

    document: str
    text: str
    tests: tuple[tuple[str, str | None], ...]


def promises() -> list[Promise]:
    """All rows of all tables, in their order."""
    return [promise for source in SOURCES for promise in _of_document(source)]


def _of_document(source: str) -> Iterator[Promise]:
    inside = False
    for line in (ROOT / source).read_text(encoding="utf-8").splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")] if line.startswith("|") else []
        if not cells:
            inside = False
        elif len(cells) == 2 and cells[1] in _HEADS:
            inside = True
        elif inside and not re.fullmatch(r"[-:]+", cells[0]):
            named = [(path, name or None) for path, name in _TEST.findall(cells[-1])]
            yield Promise(source, "|".join(cells[:-1]), tuple(named))


@cache
def marks_of(path: str) -> dict[str, set[str]]:
    """The pytest marks of each test function of a file, those of the module and of single parameters included."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    of_module = [
        node.value for node in tree.body if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "pytestmark"
    ]
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")]
    return {node.name: _marks([*of_module, *node.decorator_list]) for node in functions}


def _marks(nodes: list[ast.expr]) -> set[str]:
    words = re.findall(r"pytest\.mark\.(\w+)", " ".join(map(ast.unparse, nodes)))
    return set(words)


def commands_of(promise: Promise) -> list[str]:
    """The make targets that run the promise's tests, the quickest first."""
    targets = set()
    for path, name in promise.tests:
        marks = marks_of(path)
        for of_test in (marks[name],) if name else marks.values():
            targets |= _targets(of_test)
    return [f"make {target}" for target in ("test", "test-slow", "test-faults", "test-launch") if target in targets]


def _targets(marks: set[str]) -> set[str]:
    if "launch" in marks:
        return {"test-launch"}
    if "slow" not in marks:
        return {"test"}
    longer = {"test-faults"} if "faults" in marks else {"test-slow"}
    return longer | ({"test"} if "quick" in marks else set())


def page() -> str:
    """The whole page."""
    names = [f"[{Path(source).name}]({Path(source).name})" for source in SOURCES]
    lines = [_HEAD.format(sources=f"{', '.join(names[:-1])} and {names[-1]}")]
    for source in SOURCES:
        lines += [f"## {Path(source).name}\n", "| promise | test | runs in |", "|---|---|---|"]
        for promise in _of_document(source):
            tests = ", ".join(f"`{path}{f'::{name}' if name else ''}`" for path, name in promise.tests)
            lines.append(f"| {promise.text} | {tests} | {', '.join(f'`{command}`' for command in commands_of(promise))} |")
        lines.append("")
    return "\n".join(lines)


if __name__ == "__main__":
    print(page(), end="")
