"""Which configurations make the same run: what may differ between two attempts at it, and a hash of what may not."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rec_dist.runtime.files import fingerprint

# What may differ between two attempts at one run: none of it changes what is trained (with adapter.dropout 0).
_FREE_KEYS = (
    "cluster",
    "checkpoint",
    "track",
    "evaluate",
    "train.tokens_per_pack",
    "train.log_every_steps",
    "train.max_bad_steps",
    "model.activation_checkpointing",
    "model.attention",
    "profile",
    "plan",
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that differ and may not."""
    changed = sorted(_differences(old, new))
    return [key for key in changed if not any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)]


def identity(config: Mapping[str, Any]) -> str:
    """A short hash of a configuration without what may differ between two attempts at one run; equal where `differences` is empty."""
    kept = sorted(differences({}, json.loads(json.dumps(config))))
    return fingerprint(kept)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix
