"""Prints what `pip install -c constraints.txt '.[gguf,serve]'` would install here, each file with its SHA-256, for `--require-hashes`.

    python launchers/hashed_requirements.py > requirements.txt

Run it where the container will be built, or with the same Python on the same kind of machine: the hashes are those of the files
that pip chooses here. pip asks the package index that it is configured for, and downloads metadata, and packages without such.
"""

import json
import subprocess
import sys
from typing import Any


def requirements(report: dict[str, Any]) -> list[str]:
    """A line a package of pip's report (its format version 1), without those that lie in a folder. Raises ValueError."""
    lines = []
    for package in report["install"]:
        download, name = package["download_info"], package["metadata"]["name"]
        if "dir_info" in download:  # rec-dist itself
            continue
        found = download.get("archive_info", {}).get("hashes", {}).get("sha256")
        if found is None:
            raise ValueError(f"the index names no SHA-256 of {name}")
        lines.append(f"{name.lower()}=={package['metadata']['version']} --hash=sha256:{found}")
    return sorted(lines)


def main() -> int:
    """Returns pip's exit code."""
    pip = [sys.executable, "-P", "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*pip, "-c", "constraints.txt", ".[gguf,serve]", "hatchling"], stdout=subprocess.PIPE, text=True, check=False
    )
    if done.returncode == 0:
        print("\n".join(requirements(json.loads(done.stdout))))
    return done.returncode


if __name__ == "__main__":
    sys.exit(main())
