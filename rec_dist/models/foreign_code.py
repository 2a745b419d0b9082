"""What a model folder could run, and does not: Python files that its config.json names, and kernels of the Hub.

transformers asks on standard input whether to run a repository's Python, unless it is told; every call here tells it
model.trust_remote_code. A kernel (`attn_implementation: org/name`) is compiled code, which transformers fetches without asking
where the package `kernels` is installed.
"""

import json
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from rec_dist.errors import UserError

_KERNEL_KEYS = ("attn_implementation", "experts_implementation")
_log = logging.getLogger(__name__)


def check_no_kernel(folder: Path, *, trusted: bool) -> None:
    """Raises UserError if config.json in `folder` names a kernel of the Hub and model.trust_remote_code is false.

    Accepts a folder without a readable config.json, which whoever loads it reports.
    """
    if trusted:
        return
    try:
        config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return
    for key, value in _kernels(config):
        raise UserError(
            f"model.path ({folder}) names {key}={value[:100]!r} in its config.json, which is code of the Hub; remove that key, "
            "or set model.trust_remote_code=true"
        )


def _kernels(value: Any) -> Iterator[tuple[str, str]]:
    """The keys that name a kernel, on any level: the value holds a slash."""
    if isinstance(value, list):
        for entry in value:
            yield from _kernels(entry)
    if isinstance(value, dict):
        for key, entry in value.items():
            if key.strip("_").removesuffix("_internal") in _KERNEL_KEYS and "/" in json.dumps(entry):
                yield key, json.dumps(entry)
            yield from _kernels(entry)


def way_out(fault: BaseException) -> str:
    """What follows transformers' message: the key, if the folder was refused because it holds code; else nothing."""
    asked = "trust_remote_code" in str(fault)
    return "; read that code, then set model.trust_remote_code=true, or choose another model" if asked else ""


def tell(name: str) -> None:
    """Logs that code of the model `name` (model.path) will run."""
    _log.warning("model.trust_remote_code is true: code of %s runs here and on every worker, with your rights", name)
