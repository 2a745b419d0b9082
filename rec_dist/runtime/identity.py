"""Which configurations make the same run: what may differ between two attempts at it, and a hash of what may not."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rec_dist.storage.files import fingerprint

# What may differ between two attempts at one run: none of it changes what is trained (with adapter.dropout 0). Where the run lies is
# free, and where the data lie and in how many shards; that they are the same data, inputs.json knows (commands/train.py: bind_inputs).
_FREE_KEYS = (
    *("cluster", "checkpoint", "track", "evaluate", "profile", "plan", "submit"),
    *("train.run_dir", "train.max_tokens_per_micro_batch", "train.log_every_steps", "train.max_bad_steps"),
    *("model.activation_checkpointing", "model.attention"),
    *("data.path", "data.num_shards", "data.cache_dir", "data.cache_bytes"),
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that differ and may not."""
    return sorted(key for key in _differences(old, new) if not _is_free(key))


def identity(config: Mapping[str, Any]) -> str:
    """A short hash of a configuration without what may differ between two attempts at one run; equal where `differences` is empty."""
    return fingerprint(sorted((key, value) for key, value in flat(json.loads(json.dumps(config))) if not _is_free(key)))


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, value) of all that is no mapping."""
    if not isinstance(value, dict):
        yield prefix, value
        return
    for key, below in value.items():
        yield from flat(below, f"{prefix}.{key}" if prefix else key)


def _differences(old: Any, new: Any, prefix: str = "") -> Iterator[str]:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in sorted(old.keys() | new.keys()):
            yield from _differences(old.get(key), new.get(key), f"{prefix}.{key}" if prefix else key)
    elif old != new:
        yield prefix
