"""Changes to a configuration: words `section.key=value` of a command line, or a mapping of keys to values."""

import os
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from rec_dist.errors import UserError

Overrides = Sequence[str] | Mapping[str, Any]
_OVERRIDE = re.compile(r"[A-Za-z_][\w.]*=", re.ASCII)


def is_override(word: str) -> bool:
    """Whether a word of a command line is section.key=value."""
    return _OVERRIDE.match(word) is not None


def override(config: DictConfig, overrides: Overrides, named: Mapping[str, Sequence[str]]) -> DictConfig:
    """`config` with the overrides on top, in their order.

    named: sections whose first-level names are fixed, with these names; an override of any other name in them is refused.
    Raises UserError for a malformed override.
    """
    if isinstance(overrides, Mapping):
        return update(config, overrides)
    if not isinstance(overrides, Iterable):
        raise UserError(f"overrides ({overrides!r}) must be words section.key=value, or a mapping of keys to values")
    for word in [overrides] if isinstance(overrides, str) else overrides:
        if not (isinstance(word, str) and is_override(word)):
            raise UserError(f"override {word!r} is not section.key=value; for example optimizer.lr=1e-4")
        section, _, key = word.partition("=")[0].partition(".")
        if section in named and key.partition(".")[0] not in named[section]:
            there = (
                f"the names in `{section}` are {', '.join(named[section])}" if named[section] else f"there is no `{section}` here"
            )
            raise UserError(f"override {word!r}: {there}")
        try:
            merged = OmegaConf.merge(config, OmegaConf.from_dotlist([word]))
        except (OmegaConfBaseException, YAMLError, TypeError, UnicodeError) as fault:
            raise UserError(f"override {word!r} cannot be applied: {first_line(fault)}") from fault
        assert isinstance(merged, DictConfig)
        config = merged
    return config


def update(config: DictConfig, changes: Mapping[str, Any], prefix: str = "") -> DictConfig:
    """`config`, changed in place, with values by key. Keys are dotted or nested.

    Paths become text, and scalars of numpy those of Python.
    """
    for key, value in changes.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            if OmegaConf.select(config, name) is None:
                OmegaConf.update(config, name, {})
            update(config, value, f"{name}.")
            continue
        try:
            OmegaConf.update(config, name, _plain(value), merge=False)
        except (OmegaConfBaseException, TypeError, ValueError) as fault:
            raise UserError(f"{name} cannot be set to {value!r}: {first_line(fault)}") from fault
    return config


def _plain(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_plain(entry) for entry in value]
    if isinstance(value, np.generic):
        return value.item()
    return os.fspath(value) if isinstance(value, os.PathLike) else value


def first_line(fault: BaseException) -> str:
    """The first line of an exception's message, or its type's name."""
    return str(fault).splitlines()[0] if str(fault) else type(fault).__name__
