"""A cluster that a command starts on this machine lets nobody in without that command's token, which stands in no file. 30 s."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

# Starts a cluster, then lets a stranger try its address without the token and with another one.
PROGRAM = """
import hashlib, json, os, subprocess, sys
from rec_dist.launch.ray_cluster import connect, disconnected

stranger = "import ray, sys; ray.init(address=sys.argv[1], log_to_driver=False, logging_level='CRITICAL')"
with disconnected():
    connect(None)
    import ray
    address = ray.get_runtime_context().gcs_address
    kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    codes = []
    for token in (None, "0" * 64, os.environ["RAY_AUTH_TOKEN"]):
        own = {**kept, "RAY_AUTH_MODE": "token" if token else "disabled", **({"RAY_AUTH_TOKEN": token} if token else {})}
        line = [sys.executable, "-c", stranger, address]
        try:
            codes.append(subprocess.run(line, env=own, capture_output=True, timeout=60).returncode)
        except subprocess.TimeoutExpired:
            codes.append("no answer")
    print(json.dumps({"codes": codes, "token": hashlib.sha256(os.environ["RAY_AUTH_TOKEN"].encode()).hexdigest()}))
"""


def cluster(home: Path) -> dict[str, object]:
    environment = {name: value for name, value in os.environ.items() if not name.startswith("RAY_")}
    environment |= {"HOME": str(home), "PYTHONPATH": os.pathsep.join(sys.path)}
    line = [sys.executable, "-c", PROGRAM]
    done = subprocess.run(line, env=environment, capture_output=True, text=True, timeout=400, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return dict(json.loads(done.stdout.splitlines()[-1]))


def test_each_command_has_a_token_of_its_own(tmp_path: Path) -> None:
    found = [cluster(tmp_path) for _ in range(2)]
    for one in found:
        without, other, own = one["codes"]  # type: ignore[misc]
        assert own == 0, one
        assert without != 0 and other != 0, one
    assert found[0]["token"] != found[1]["token"]
    assert list(tmp_path.rglob("*token*")) == [], "Ray would keep one for all clusters"
