"""Models of the Hugging Face Hub: from an id such as `org/name` to a folder in this node's cache.

Only safetensors, tokenizer and configuration files are fetched, and no code unless model.trust_remote_code asks for it.
HF_HOME, HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE work as everywhere else. Cost: two short requests for a model that is in the
cache, none if model.revision is a full commit hash.
"""

import json
import logging
import re
from contextlib import suppress
from pathlib import Path
from typing import NamedTuple

from safetensors import SafetensorError, safe_open

from rec_dist.errors import UserError, one_line
from rec_dist.storage.disk import as_disk_error
from rec_dist.storage.uri import is_below

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_WHOLE, _INDEX = "model.safetensors", "model.safetensors.index.json"
_CONFIG, _CODE = ["config.json"], ["*.py"]
_MODEL = [
    *_CONFIG,
    "generation_config.json",
    "model*.safetensors",  # not consolidated.safetensors, in which Mistral's repositories hold the weights a second time
    _INDEX,
    "tokenizer*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab*",
    "merges.txt",
    "chat_template*",
    "*.model",  # SentencePiece
]
_LFS_POINTER = b"version https://git-lfs"
_log = logging.getLogger(__name__)


class Snapshot(NamedTuple):
    """One commit of a repository."""

    repository: str
    commit: str


def is_hub_id(path: str) -> bool:
    """Whether `path` reads as org/name and is no folder here. A relative folder of two parts is written ./models/mine."""
    return HUB_ID.fullmatch(path) is not None and not Path(path).exists()


def snapshot_of(folder: Path) -> Snapshot | None:
    """What the folder of a Hub cache holds, by its name: .../models--org--name/snapshots/COMMIT. None for another folder."""
    repository = folder.parent.parent.name
    if folder.parent.name != "snapshots" or not repository.startswith("models--") or not _COMMIT.fullmatch(folder.name):
        return None
    return Snapshot(repository.removeprefix("models--").replace("--", "/"), folder.name)


def on_this_node(folder: Path, *, code: bool = False) -> Path:
    """The same model on this node: `folder`, or if that is a Hub cache of another node, the same commit in this node's cache.

    code: as in fetch_model.

    Every worker of a node may call it at once; huggingface_hub locks each file, so that it is fetched once.
    """
    snapshot = snapshot_of(folder)
    if snapshot is None or (folder / "config.json").is_file():
        return folder
    return fetch_model(*snapshot, code=code)


def fetch_model(repository: str, revision: str | None, *, code: bool = False) -> Path:
    """The folder with config.json, weights and tokenizer. revision: a branch, tag or commit; None: main. code: also *.py files.

    Raises UserError if there is no such model, it may not be read, it has no safetensors, or it is not in the cache while the Hub
    cannot be reached.
    """
    folder = _fetch(repository, revision, [*_MODEL, *_CODE] if code else _MODEL)
    if not (folder / "config.json").is_file():
        raise UserError(f"model.path ({repository}) has no config.json on the Hub; choose a model that transformers loads")
    missing = [name for name in weight_files(folder) if not (folder / name).is_file()]
    if missing and any(folder.glob("model*.safetensors")):
        raise UserError(f"model.path ({repository}): {folder} lacks {missing[0]}; run once with the Hub in reach")
    if missing:
        raise UserError(
            f"model.path ({repository}) has no model.safetensors; choose a model or a revision that is saved as safetensors"
        )
    return folder


def fetch_config(repository: str, revision: str | None, *, code: bool = False) -> Path:
    """The folder with config.json; weights may be missing. Raises UserError as fetch_model."""
    return _fetch(repository, revision, [*_CONFIG, *_CODE] if code else _CONFIG)


def weight_files(folder: Path) -> list[str]:
    """The names of the files that hold the weights of a model folder, as transformers finds them. They may be missing.

    Raises UserError for an index that cannot be read, or that names a file elsewhere.
    """
    index = folder / _INDEX
    if (folder / _WHOLE).is_file() or not index.is_file():
        return [_WHOLE]
    try:
        names = sorted(set(map(str, json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as fault:
        raise UserError(f"{index} cannot be read ({one_line(fault)}); fetch or save the model again") from fault
    if outside := [name for name in names if not is_below(name)]:
        raise UserError(f"{index} names a file outside its folder ({outside[0]!r}); fetch or save the model again")
    return names


def weight_shapes(path: Path, way_out: str, *, key: str = "") -> dict[str, tuple[int, ...]]:
    """Name -> shape of each tensor in a .safetensors file, from its header, which is compared with the file's size.

    Raises UserError with `way_out` if the file is cut short, damaged or a pointer of Git LFS. key: what begins the message.
    """
    try:
        with safe_open(path, framework="np") as tensors:
            return {name: tuple(tensors.get_slice(name).get_shape()) for name in tensors.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as fault:
        pointer = False
        with suppress(OSError), path.open("rb") as handle:
            pointer = handle.read(len(_LFS_POINTER)) == _LFS_POINTER
        mend = "it is a pointer of Git LFS: run `git lfs pull`" if pointer else way_out
        raise UserError(f"{key}{path} cannot be read ({one_line(fault)}); {mend}") from fault


def _fetch(repository: str, revision: str | None, patterns: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    name = f"{repository} at {revision}" if revision else repository
    _log.info("model.path: looking up %s on the Hugging Face Hub", name)
    try:
        folder = snapshot_download(repository, revision=revision, allow_patterns=patterns, ignore_patterns=["*/*"])
    except Exception as fault:  # a download fails with huggingface_hub's kinds of error, with httpx's and with OSError
        if as_disk_error(fault) is not None:
            raise
        raise UserError(_reason(repository, revision, fault)) from fault
    return Path(folder)


def _reason(repository: str, revision: str | None, fault: Exception) -> str:
    from huggingface_hub import constants
    from huggingface_hub.errors import (
        GatedRepoError,
        HfHubHTTPError,
        HFValidationError,
        LocalEntryNotFoundError,
        OfflineModeIsEnabled,
        RepositoryNotFoundError,
        RevisionNotFoundError,
    )

    key, hub = f"model.path ({repository})", constants.ENDPOINT
    if isinstance(fault, HFValidationError):
        return f"{key} is no existing folder and no id that the Hub allows ({fault}); check the name, or give a folder"
    if isinstance(fault, GatedRepoError):
        return f"{key} is gated: accept its terms at {hub}/{repository} and set HF_TOKEN, or give a folder"
    if isinstance(fault, RepositoryNotFoundError):
        return f"{key} is no existing folder and no model at {hub} that you may read; check the name, or set HF_TOKEN"
    if isinstance(fault, RevisionNotFoundError):
        return f"model.revision ({revision}) is no branch, tag or commit of {repository} at {hub}; set another, or leave it out"
    if isinstance(fault, OfflineModeIsEnabled) or isinstance(fault.__cause__, OfflineModeIsEnabled):
        wanted = f" at model.revision ({revision})" if revision else ""
        return (
            f"{key} is no existing folder and{wanted} not whole in the cache {constants.HF_HUB_CACHE}, "
            "and HF_HUB_OFFLINE is set; unset HF_HUB_OFFLINE once, set HF_HOME to a cache that has it, or give a folder"
        )
    cause = fault.__cause__ if isinstance(fault, LocalEntryNotFoundError) and isinstance(fault.__cause__, Exception) else fault
    if isinstance(cause, HfHubHTTPError) and cause.response.status_code in (401, 403):
        return f"{key} was refused by {hub} (HTTP {cause.response.status_code}); set HF_TOKEN to a token that may read it"
    why = one_line(cause, 200)
    return (
        f"{key} is no existing folder and cannot be fetched from {hub} ({type(cause).__name__}: {why}); check the network, "
        "HF_ENDPOINT and your proxy, or give a folder"
    )
