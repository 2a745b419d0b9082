"""Names that tests, benchmarks and examples take from the packages are there, also where an import runs only in a long test."""

import ast
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PLACES = {"rec_dist": ROOT, "rec_dist_kernels": ROOT / "kernels", "benchmarks": ROOT}


def source_of(module: str) -> Path | None:
    """The file of a module, or None if there is none."""
    place = PLACES[module.partition(".")[0]].joinpath(*module.split("."))
    return next((path for path in (place.with_suffix(".py"), place / "__init__.py") if path.is_file()), None)


@cache
def names_in(path: Path) -> frozenset[str]:
    """What a module binds at its top level, also below `if` and `try`."""
    found: set[str] = set()
    todo: list[ast.AST] = list(ast.parse(path.read_text(encoding="utf-8")).body)
    while todo:
        node = todo.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            found.add(node.name)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            found |= {alias.asname or alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.If | ast.Try | ast.With):
            todo += ast.iter_child_nodes(node)
        else:
            found |= {part.id for part in ast.walk(node) if isinstance(part, ast.Name) and isinstance(part.ctx, ast.Store)}
    return frozenset(found)


@pytest.mark.parametrize("folder", ["tests", "benchmarks", "examples"])
def test_imported_names_exist(folder: str) -> None:
    missing = []
    for path in sorted((ROOT / folder).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            if module is None or module.partition(".")[0] not in PLACES:
                continue
            source = source_of(module)
            names = [alias.name for alias in node.names]
            if source is None or "__getattr__" in names_in(source):
                missing += [] if source else [f"{path.relative_to(ROOT)}:{node.lineno} {module}"]
                continue
            absent = [name for name in names if name not in names_in(source) and source_of(f"{module}.{name}") is None]
            missing += [f"{path.relative_to(ROOT)}:{node.lineno} {module}.{name}" for name in absent]
    assert not missing
