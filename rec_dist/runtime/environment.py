"""What a result depends on besides its configuration: versions, commit and hardware. Every run records it."""

import os
import platform
import re
import subprocess
import sys
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

_SECRET = re.compile(r"(runs\.[^.=]+\.)?submit[.=]")
_PACKAGES = ("rec-dist", "torch", "deepspeed", "transformers", "peft", "ray", "pyarrow", "triton", "omegaconf", "numpy")
# Libraries of which the package uses names that they may change in any minor release, at the versions of constraints.txt.
_PRIVATE_NAMES_OF = {"ray": "2.60.0", "deepspeed": "0.19.8", "transformers": "5.23.0", "peft": "0.21.2", "torch": "2.13.0"}


def untested() -> str | None:
    """A line if a library whose private names are used has another minor version here than rec-dist was tested with, or None.

    Cost: some milliseconds. Whoever starts a run should read it before the run, and not after hours in its traceback.
    """
    found = {name: _version(name) for name in _PRIVATE_NAMES_OF}
    other = [
        name for name, tested in _PRIVATE_NAMES_OF.items() if (here := found[name]) is None or _minor(here) != _minor(tested)
    ]
    if not other:
        return None
    pairs = "; ".join(f"{name}: tested with {_PRIVATE_NAMES_OF[name]}, found {found[name] or 'none'}" for name in other)
    return f"{pairs}. Private names of these libraries are used, which may have changed; constraints.txt has the tested versions"


def _minor(version: str) -> list[str]:
    return version.split(".")[:2]


def describe(**facts: Any) -> dict[str, Any]:
    """Describe the environment of this process. `facts` (hashes of data and model) are added unchanged."""
    return {
        "versions": versions(),
        "commit": _commit(),
        "command": without_secrets(sys.argv),
        "hardware": {"machine": platform.machine(), "cpus": os.cpu_count(), "cpu": _cpu_name(), "gpus": _gpu_names()},
        **facts,
    }


def without_secrets(words: Sequence[str]) -> list[str]:
    """A command line as it is written down: overrides of `submit`, which may hold variables of a job, without their values."""
    return [f"{word.partition('=')[0]}=..." if _SECRET.match(word) else word for word in words]


def versions() -> dict[str, str | None]:
    """Versions of Python and of the packages that a result depends on; None for a package that is not installed."""
    return {"python": platform.python_version(), **{name: _version(name) for name in _PACKAGES}}


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _commit() -> str | None:
    """The commit this package runs from, with "+changes" if files differ from it; None outside a checkout."""
    root = Path(__file__).resolve().parents[2]
    if not (root / ".git").exists():
        return None
    try:
        commit = _git(root, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(root, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(root: Path, *arguments: str) -> str:
    return subprocess.run(
        ["git", "-C", str(root), *arguments], capture_output=True, text=True, check=True, timeout=10
    ).stdout.strip()


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor()


def _gpu_names() -> list[str]:
    import torch

    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
