"""The architecture as tests: which package imports which, one place for each library, sizes, names, types and style.

The layers themselves are import-linter contracts in pyproject.toml. Cost: about 5 s with a warm mypy cache.
"""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import grimp
import pytest

from rec_dist.config.method_table import BUILT_IN

ROOT = Path(__file__).parents[1]
SOURCES = sorted([*(ROOT / "rec_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])
MAX_FILE_LINES, MAX_FUNCTION_LINES = 250, 60

# Today's exceptions with their sizes. None may grow, and none may be added without a reason here.
LONG_FILES: dict[str, int] = {
    "rec_dist/config/schema.py": 371
}  # holds every key in one place, one line of meaning each; no logic
LONG_FUNCTIONS: dict[str, int] = {}
BARE_FOLDERS: set[str] = set()

# Library -> the modules (or packages) that may import it.
PLACES = {
    "deepspeed": ("rec_dist.engine",),
    "ray": (
        "rec_dist.launch.ray_cluster",
        "rec_dist.launch.ray_workers",
        "rec_dist.launch.ray_metrics",
        "rec_dist.launch.prepare_on_ray",
        "rec_dist.launch.embed_on_ray",
        "rec_dist.launch.rank_on_ray",
        "rec_dist.launch.ray_data",
        "rec_dist.launch.dtype_on_ray",
        "rec_dist.launch.replicas_on_ray",
        "rec_dist.submit.ray_job",
    ),
    "triton": ("rec_dist_kernels",),
    "pyarrow": ("rec_dist.data", "rec_dist.storage"),
    "sklearn": ("rec_dist.methods.p2rec.categories", "rec_dist.methods.neighbours.tables"),
    "scipy": ("rec_dist.methods.neighbours", "rec_dist.methods.ensemble.weights"),
    "matplotlib": ("rec_dist.report.plots",),
    "tensorboardX": ("rec_dist.training.trackers",),
    "wandb": ("rec_dist.training.trackers",),
    "mlflow": ("rec_dist.training.trackers",),
    "omegaconf": ("rec_dist.config",),
    "peft": ("rec_dist.models",),
    "liger_kernel": ("rec_dist.models.fused_layers",),
    "fastapi": ("rec_dist.serving",),
    "starlette": ("rec_dist.serving",),
    "uvicorn": ("rec_dist.serving",),
    "prometheus_client": ("rec_dist.serving",),
    "gguf": ("rec_dist.models.pretrained",),
}

# Package of rec_dist.data -> the other packages that it imports, as its docstring says. pyproject.toml fixes their order.
DATA_ROOMS = {
    "prepare": {"sources", "dataset"},
    "prompts": {"sampling", "dataset"},
    "sources": {"dataset"},
    "sampling": {"dataset"},
    "artifacts": {"dataset"},
    "dataset": set(),
}


@pytest.fixture(scope="module")
def graph() -> grimp.ImportGraph:
    return grimp.build_graph("rec_dist", "rec_dist_kernels", include_external_packages=True, cache_dir=None)


def run(*command: str) -> None:
    done = subprocess.run([sys.executable, *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{' '.join(command)}\n{done.stdout}{done.stderr}"


def test_imports_keep_to_the_layers() -> None:
    run("-c", "from importlinter.cli import lint_imports_command; lint_imports_command()", "--no-cache")


@pytest.mark.parametrize("library", sorted(PLACES))
def test_each_library_has_one_place(graph: grimp.ImportGraph, library: str) -> None:
    importers = graph.find_modules_that_directly_import(library) if library in graph.modules else set()
    places = PLACES[library]
    outside = sorted(
        module for module in importers if not any(module == place or module.startswith(f"{place}.") for place in places)
    )
    assert not outside, f"{library} is imported by {outside}; only {places} may"


def test_places_are_checked_against_real_imports(graph: grimp.ImportGraph) -> None:
    """Otherwise a graph without external packages would pass every check."""
    assert "rec_dist.engine.engine" in graph.find_modules_that_directly_import("deepspeed")
    assert "rec_dist.data.dataset.manifest" in graph.find_modules_that_directly_import("pyarrow")


def test_the_packages_of_data_import_what_they_say(graph: grimp.ImportGraph) -> None:
    """Stricter than the order of layers: prepare may not import sampling, although sampling is below it.

    A package that no longer needs another must say so.
    """
    found: dict[str, set[str]] = {child.removeprefix("rec_dist.data."): set() for child in graph.find_children("rec_dist.data")}
    for place, places in found.items():
        for module in {f"rec_dist.data.{place}", *graph.find_descendants(f"rec_dist.data.{place}")}:
            imported = graph.find_modules_directly_imported_by(module)
            places |= {name.split(".")[2] for name in imported if name.startswith("rec_dist.data.")} - {place}
    assert found == DATA_ROOMS


def test_kernels_know_torch_and_triton_only(graph: grimp.ImportGraph) -> None:
    modules = {"rec_dist_kernels", *graph.find_descendants("rec_dist_kernels")}
    imported = {name.split(".")[0] for module in modules for name in graph.find_modules_directly_imported_by(module)}
    assert imported - set(sys.stdlib_module_names) <= {"rec_dist_kernels", "torch", "triton"}


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """(path:name, lines) of every function, nested ones included."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            yield f"{path.relative_to(ROOT)}:{node.name}", node.end_lineno - node.lineno + 1


def over(sizes: dict[str, int], limit: int) -> dict[str, int]:
    return {name: size for name, size in sizes.items() if size > limit}


def test_files_are_short() -> None:
    sizes = {str(path.relative_to(ROOT)): len(path.read_text(encoding="utf-8").splitlines()) for path in SOURCES}
    long = over(sizes, MAX_FILE_LINES)
    assert {name: size for name, size in long.items() if size > LONG_FILES.get(name, 0)} == {}
    assert set(LONG_FILES) <= set(long), "an exception is no longer needed; remove it"


def test_functions_are_short() -> None:
    long = over(dict(found for path in SOURCES for found in functions(path)), MAX_FUNCTION_LINES)
    assert {name: size for name, size in long.items() if size > LONG_FUNCTIONS.get(name, 0)} == {}
    assert set(LONG_FUNCTIONS) <= set(long), "an exception is no longer needed; remove it"


@pytest.mark.parametrize("word", ["utils", "util", "helpers", "helper", "common", "misc"])
def test_no_module_is_named_after_nothing(word: str) -> None:
    files = [*SOURCES, *(ROOT / "tests").rglob("*.py"), *(ROOT / "launchers").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]
    assert [path for path in files if word in (path.stem, path.parent.name)] == []


def uses_of_kind(tree: ast.AST) -> Iterator[int]:
    """Lines that read `task.kind` for more than a message or a report, that is, outside f-strings and values of dicts."""
    reported = {
        id(child)
        for node in ast.walk(tree)
        for child in (node.values if isinstance(node, ast.Dict) else [node.value] if isinstance(node, ast.FormattedValue) else [])
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr == "kind" and id(node) not in reported:
            owner = node.value
            if (owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")) == "task":
                yield node.lineno


def test_only_methods_know_which_method_it_is() -> None:
    """Rejects branches on task.kind and names of methods outside methods/ and the table that finds them."""
    table = ROOT / "rec_dist" / "config" / "method_table.py"
    known = {"rec_dist/config/task.py": {"sft"}}  # the default
    found = []
    for path in SOURCES:
        if (ROOT / "rec_dist" / "methods") in path.parents or path == table or (ROOT / "kernels") in path.parents:
            continue
        tree, name = ast.parse(path.read_text(encoding="utf-8")), str(path.relative_to(ROOT))
        found += [f"{name}:{line} reads task.kind" for line in uses_of_kind(tree)]
        words = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
        found += [f"{name} names the method {word}" for word in (words & set(BUILT_IN)) - known.get(name, set())]
    assert found == []


@pytest.mark.parametrize(
    ("line", "uses"),
    [
        ("if config.task.kind == 'sft': pass", 1),
        ("kind = task.kind", 1),
        ("table[config.task.kind]", 1),
        ("f'task.kind={config.task.kind}'", 0),
        ("report = {'task.kind': config.task.kind}", 0),
        ("adapter.kind == 'lora'", 0),
    ],
)
def test_the_search_for_branches_finds_them(line: str, uses: int) -> None:
    assert len(list(uses_of_kind(ast.parse(line)))) == uses


def test_every_module_says_what_it_holds() -> None:
    silent = [
        str(path.relative_to(ROOT))
        for path in SOURCES
        if path.read_text(encoding="utf-8").strip() and not ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    ]
    assert silent == []


def test_every_folder_of_modules_is_a_package() -> None:
    """Without __init__.py a folder merges with any other folder of its name on the path."""
    bare = {str(path.parent.relative_to(ROOT)) for path in SOURCES if not (path.parent / "__init__.py").exists()}
    assert bare == BARE_FOLDERS


def test_an_init_file_only_reexports() -> None:
    for path in SOURCES:
        if path.name != "__init__.py":
            continue
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            docstring = isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
            exports = isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) in ("__all__", "__version__")
            # Lazy re-exports: what type checkers read, and the hook that imports a name on first use.
            typing = isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"
            hook = isinstance(node, ast.FunctionDef) and node.name == "__getattr__"
            imports = isinstance(node, ast.Import | ast.ImportFrom)
            silent = isinstance(node, ast.Expr) and "addHandler(logging.NullHandler())" in ast.unparse(node)
            assert docstring or exports or typing or hook or imports or silent, f"{path}:{node.lineno}"


def test_packing_scorer_and_kernels_need_no_configuration_library() -> None:
    """A GPU image without Ray, DeepSpeed and OmegaConf can still run and measure the model."""
    absent = ("omegaconf", "pydantic", "ray", "deepspeed", "pyarrow")
    modules = (
        "rec_dist.packing.packed_batch, rec_dist.models.scorer, rec_dist.losses, rec_dist.methods.preference, rec_dist_kernels"
    )
    run("-c", f"import sys; sys.modules.update(dict.fromkeys({absent!r})); import {modules}")


def test_types_are_strict() -> None:
    run("-m", "mypy", "--strict")


def test_style_is_clean() -> None:
    run("-m", "ruff", "check", ".")


def test_code_is_formatted() -> None:
    run("-m", "ruff", "format", "--check", ".")


def test_there_is_no_package_called_kernels_and_no_init_in_tests() -> None:
    """A top-level package `kernels` would hide the one that transformers imports."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert not (ROOT / "tests" / "kernels").exists()
    assert list((ROOT / "tests").rglob("__init__.py")) == []
