"""When two configurations describe the same run: which keys may differ between attempts, and a hash of the others."""

import json
from collections.abc import Iterator, Mapping
from typing import Any

from rec_dist.storage.files import fingerprint

# Keys that may differ between two attempts at one run, because they do not change what is trained (with adapter.dropout 0). The
# location of the run and of its data are free; inputs.json checks that the data are the same (commands/train.py: bind_inputs).
_FREE_KEYS = (
    *("cluster", "checkpoint", "track", "evaluate", "profile", "plan", "submit"),
    *("train.run_dir", "train.max_tokens_per_micro_batch", "train.log_every_steps", "train.max_bad_steps", "train.access"),
    "train.dataloader_num_workers",
    *("model.activation_checkpointing", "model.attention", "model.fused_layers"),
    *("data.path", "data.access", "data.num_shards", "data.cache_dir", "data.cache_bytes"),
)


def differences(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """Dotted keys that differ although they must not."""
    return sorted(key for key in _differences(old, new) if not _is_free(key))


def identity(config: Mapping[str, Any]) -> str:
    """A short hash of the keys that must not differ between attempts. Equal for two configurations without `differences`."""
    return fingerprint(sorted((key, value) for key, value in flat(json.loads(json.dumps(config))) if not _is_free(key)))


def _is_free(key: str) -> bool:
    return any(key == free or key.startswith(f"{free}.") for free in _FREE_KEYS)


def flat(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every value that is not a mapping."""
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
