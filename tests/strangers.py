"""Somebody on the network who knows the address of a Ray cluster, with a token or without."""

import os
import subprocess
import sys


def is_let_in(address: str, token: str | None) -> bool:
    """Whether the head of the cluster at HOST:PORT tells `ray status` to a process with this token, or with none."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"RAY_AUTH_MODE": "disabled"} if token is None else {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": token}
    line = [sys.executable, "-m", "ray.scripts.scripts", "status", "--address", address]
    try:
        done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=90, check=False)
    except subprocess.TimeoutExpired:
        return False
    return done.returncode == 0 and "Node status" in done.stdout
