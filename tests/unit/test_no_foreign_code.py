"""A scan of the package: no call in it can run code that a file holds, and no child process takes modules of its folder.

Each rule is tried on lines that break it. ALLOWED names the lines that may, with the reason.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from rec_dist.commands.stages import stages_forked
from rec_dist.errors import UserError
from rec_dist.runtime.packages import fetch_member

ROOT = Path(__file__).parents[2]
SOURCES = sorted([*(ROOT / "rec_dist").rglob("*.py"), *(ROOT / "kernels").rglob("*.py")])

# file: what it may do, and why nothing of a file runs there. No pickle, and no load that may unpickle, in any file.
ALLOWED = {
    "rec_dist/runtime/messages.py": ("print",),  # say() itself
    "rec_dist/config/reference.py": ("print",),  # python -m rec_dist.config.reference writes docs/configuration.md
    "rec_dist/models/served/score.py": ("print",),  # a script that an exported model takes along: its output is JSON
    "rec_dist/models/served/score_on_server.py": ("print",),
    "rec_dist/commands/submit.py": ("print",),  # --dry-run prints exactly what would be sent
    "rec_dist/submit/ray_job.py": ("print",),  # the output of the user's own job, which has been made visible there
}
_PICKLES = {"pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
_SHELLS = {"system", "popen"}
_YAML = {
    "load",
    "load_all",
    "full_load",
    "full_load_all",
    "unsafe_load",
    "unsafe_load_all",
    "Loader",
    "FullLoader",
    "UnsafeLoader",
}


def _dotted(node: ast.AST) -> str:
    """`a.b.c` of a chain of names, else an empty text."""
    if isinstance(node, ast.Attribute):
        above = _dotted(node.value)
        return f"{above}.{node.attr}" if above else ""
    return node.id if isinstance(node, ast.Name) else ""


def _is(call: ast.Call, keyword: str, value: object) -> bool:
    return any(
        word.arg == keyword and isinstance(word.value, ast.Constant) and word.value.value is value for word in call.keywords
    )


def _faults_of_call(call: ast.Call) -> Iterator[str]:
    name = _dotted(call.func) or (call.func.attr if isinstance(call.func, ast.Attribute) else "")
    owner, _, last = name.rpartition(".")
    given = {word.arg for word in call.keywords}
    if isinstance(call.func, ast.Name) and name in ("eval", "exec", "compile", "__import__", "print"):
        yield name
    if last == "load" and owner.split(".")[-1] == "torch" and not _is(call, "weights_only", True):
        yield "torch.load"
    if "allow_pickle" in given and not _is(call, "allow_pickle", False):
        yield "allow_pickle"
    if owner.split(".")[-1] == "yaml" and last in _YAML:
        yield "yaml"
    if ("shell" in given and not _is(call, "shell", False)) or (owner == "os" and last in _SHELLS):
        yield "shell"
    if last == "from_pretrained" and owner.endswith("PeftModel"):
        return  # takes safetensors if they are there, which merge.py asserts, and runs no code of a repository
    if last in ("from_pretrained", "from_config"):
        if "trust_remote_code" not in given:
            yield "trust_remote_code"
        if last == "from_pretrained" and "Model" in owner and not _is(call, "use_safetensors", True):
            yield "use_safetensors"


def _faults_of_node(node: ast.AST) -> Iterator[str]:
    if isinstance(node, ast.Import):
        yield from ("pickle" for name in node.names if name.name.split(".")[0] in _PICKLES)
    elif isinstance(node, ast.ImportFrom):
        package = (node.module or "").split(".")[0]
        names = {name.name for name in node.names}
        if package in _PICKLES:
            yield "pickle"
        if package == "yaml" and names & _YAML:
            yield "yaml"
        if package == "os" and names & _SHELLS:
            yield "shell"
        if package == "torch" and "load" in names:
            yield "torch.load"
    elif isinstance(node, ast.Call):
        yield from _faults_of_call(node)
    elif isinstance(node, ast.List | ast.Tuple):
        for first, second in zip(node.elts, [*node.elts, None][1:], strict=True):
            named = isinstance(first, ast.Constant) and first.value in ("python", "python3")
            if (named or _dotted(first) == "sys.executable") and not (isinstance(second, ast.Constant) and second.value == "-P"):
                yield "-P"


def faults_in(text: str) -> list[str]:
    return [fault for node in ast.walk(ast.parse(text)) for fault in _faults_of_node(node)]


def test_the_package_runs_nothing_out_of_files() -> None:
    found: dict[str, set[str]] = {}
    for path in SOURCES:
        if faults := set(faults_in(path.read_text(encoding="utf-8"))):
            found[str(path.relative_to(ROOT))] = faults
    assert found == {name: set(kinds) for name, kinds in ALLOWED.items()}


@pytest.mark.parametrize(
    ("line", "fault"),
    [
        ("import pickle", "pickle"),
        ("from cloudpickle import loads", "pickle"),
        ("import ray.cloudpickle, dill", "pickle"),
        ("torch.load(path)", "torch.load"),
        ("torch.load(path, weights_only=False)", "torch.load"),
        ("torch.load(path, weights_only=flag)", "torch.load"),
        ("from torch import load", "torch.load"),
        ("np.load(path, allow_pickle=True)", "allow_pickle"),
        ("np.load(path, allow_pickle=flag)", "allow_pickle"),
        ("yaml.load(text, Loader=yaml.Loader)", "yaml"),
        ("yaml.unsafe_load(text)", "yaml"),
        ("from yaml import load", "yaml"),
        ("eval(text)", "eval"),
        ("exec(text)", "exec"),
        ("subprocess.run(line, shell=True)", "shell"),
        ("os.system(line)", "shell"),
        ("AutoConfig.from_pretrained(path)", "trust_remote_code"),
        ("AutoModelForCausalLM.from_config(config)", "trust_remote_code"),
        ("AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False)", "use_safetensors"),
        ("run([sys.executable, '-m', 'rec_dist'])", "-P"),
        ("run([sys.executable])", "-P"),
        ("words = ('python', '-m', 'rec_dist')", "-P"),
        ("print(title)", "print"),
        ("__import__(name)", "__import__"),
    ],
)
def test_the_scan_finds(line: str, fault: str) -> None:
    assert faults_in(line) == [fault]


@pytest.mark.parametrize(
    "line",
    [
        "torch.load(path, weights_only=True)",
        "np.load(path)",
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "model.to(device).eval()",
        "[]",
        "re.compile(pattern)",
        "subprocess.run([sys.executable, '-P', '-m', 'pip'])",
        "words = ('python', '-P', '-m', 'rec_dist')",
        "AutoTokenizer.from_pretrained(path, trust_remote_code=trusted)",
        "AutoModelForCausalLM.from_pretrained(path, trust_remote_code=False, use_safetensors=True)",
    ],
)
def test_the_scan_accepts(line: str) -> None:
    assert faults_in(line) == []


def test_no_file_of_a_job_starts_python_without_the_option() -> None:
    """The scripts and templates, and what they render to (the golden files), on lines that are no comments."""
    started = re.compile(r"(?<![\w./-])python3?(?= +[-\w])(?! +-P )")
    files = [path for path in (ROOT / "launchers").iterdir() if path.suffix in (".sh", ".j2")]
    files += (ROOT / "tests" / "launch" / "golden").iterdir()
    lines = [(path.name, line) for path in files for line in path.read_text(encoding="utf-8").splitlines()]
    assert any("python -P -m rec_dist" in line for _, line in lines)
    assert [(name, line) for name, line in lines if started.search(line) and not line.lstrip().startswith("#")] == []
    for line in ("python -m rec_dist train", "exec python3 - <<", "x; python job.py"):
        assert started.search(line)


@pytest.fixture
def planted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with modules that Python's own code imports and that end whoever imports them."""
    for name in ("argparse", "json", "logging", "zipfile"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('planted')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PYTHONPATH", f"{ROOT}:{ROOT / 'kernels'}")
    return tmp_path


def test_a_stage_takes_no_module_of_the_working_directory(planted: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert subprocess.run([sys.executable, "-m", "rec_dist", "--version"], capture_output=True, check=False).returncode == 1
    with stages_forked(preload=False) as stages:
        assert stages.run(["--version"]) == 0
    assert "planted" not in capfd.readouterr().err


def test_pip_takes_no_module_of_the_working_directory(planted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(UserError, match="No matching distribution"):
        fetch_member("no-such-package-of-rec-dist", "1", "x", "0" * 64, planted / "x")
