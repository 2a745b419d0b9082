"""Changes to a configuration that come as Python values, not as words of a command line."""

import os
from collections.abc import Mapping
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec_dist.errors import UserError


def updated(merged: Any, changes: Mapping[str, Any], prefix: str = "") -> Any:
    """`merged` with changes by key, dotted or nested. Paths become text."""
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if OmegaConf.select(merged, name) is None:
                OmegaConf.update(merged, name, {})
            updated(merged, value, f"{name}.")
            continue
        try:
            OmegaConf.update(merged, name, _plain(value), merge=False)
        except (OmegaConfBaseException, TypeError, ValueError) as fault:
            raise UserError(f"{name} cannot be set to {value!r}: {' '.join(str(fault).split())}") from fault
    return merged


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    return os.fspath(value) if isinstance(value, os.PathLike) else value
