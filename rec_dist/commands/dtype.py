"""model.dtype=auto becomes a dtype once, before anything is computed. It stands in config.yaml from then on, and a resume keeps it.

A run that continued in another dtype would be another run, and reference log-probs of one dtype are wrong for the other.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rec_dist.config.references import rebuilt
from rec_dist.config.schema import RunConfig
from rec_dist.launch.dtype import choose_dtype, why_slow
from rec_dist.methods.registry import method_of

_DTYPES = ("float32", "bfloat16")


def settle_dtype(config: RunConfig, earlier: str | None = None) -> tuple[RunConfig, list[str]]:
    """The configuration without model.dtype=auto, and lines for the log on its dtype.

    earlier: the dtype that the same run began with, if it did. Recommenders have no choice: `auto` stays.
    """
    if not method_of(config).ranker.language_model:
        return config, []
    dtype: str = config.model.dtype
    lines: list[str] = []
    if dtype == "auto" and earlier is not None:
        dtype = earlier
        lines.append(f"model.dtype={dtype}, as this run began")
    elif dtype == "auto":
        choice = choose_dtype(config.cluster)
        dtype = choice.dtype
        lines.append(f"model.dtype={dtype}: {choice.why}")
    if slow := why_slow(config.cluster, dtype):
        lines.append(f"model.dtype={dtype} is slow here: {slow}")
    value = config.model_dump()
    value["model"]["dtype"] = dtype
    return rebuilt(config, value), lines


def saved_dtype(folder: Path) -> str | None:
    """The dtype of the run in `folder`; None if no run is there, or its configuration names none or cannot be read."""
    try:
        return dtype_in(json.loads((folder / "config.json").read_text(encoding="utf-8")))
    except (OSError, ValueError, RecursionError):
        return None


def dtype_in(saved: Any) -> str | None:
    """The dtype in a configuration that a run has saved; None for auto, and without one."""
    model = saved.get("model") if isinstance(saved, Mapping) else None
    dtype = model.get("dtype") if isinstance(model, Mapping) else None
    return dtype if dtype in _DTYPES else None


def difference(config: RunConfig, other: Path, what: str) -> list[str]:
    """A line if the run in the folder `other`, which is `what` to this configuration, was trained in another dtype."""
    theirs = saved_dtype(other)
    if theirs is None or theirs == config.model.dtype or config.model.dtype == "auto":
        return []
    return [f"{what} ({other}) was trained with model.dtype={theirs}, and this computes in {config.model.dtype}"]
