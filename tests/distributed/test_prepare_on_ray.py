"""`rec-dist prepare` on real Ray Data workers: the bytes of memory, and one line for a bad byte and for no row. About a minute."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

pytestmark = pytest.mark.slow


def rec_dist(*words: object) -> subprocess.CompletedProcess[str]:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    line = [sys.executable, "-m", "rec_dist", *map(str, words)]
    return subprocess.run(line, capture_output=True, text=True, env=environment, timeout=400, check=False)


def test_the_same_bytes_and_the_same_refusal(tmp_path: Path, tiny_source: Path) -> None:
    data = {"source": str(tiny_source), "path": str(tmp_path / "memory"), "min_rating": 3.0, "split": "global_temporal"}
    config = tmp_path / "config.yaml"
    config.write_text(yaml.safe_dump({"data": data, "train": {"run_dir": str(tmp_path / "run")}}))
    for place in ("memory", "ray"):
        done = rec_dist("prepare", config, f"data.prepare_on={place}", f"data.path={tmp_path / place}")
        assert done.returncode == 0, done.stderr
    names = sorted(path.name for path in (tmp_path / "memory").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ray").iterdir())
    for name in names:
        assert (tmp_path / "memory" / name).read_bytes() == (tmp_path / "ray" / name).read_bytes(), name

    broken = tmp_path / "broken.csv"  # its first row is fine, so only a worker finds the byte that is not UTF-8
    broken.write_bytes(b"user,item,timestamp\na,x,1\nb,\xff,2\n")
    done = rec_dist("prepare", config, "data.prepare_on=ray", f"data.source={broken}", f"data.path={tmp_path / 'no'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: {broken}:3: this line is not UTF8 text")
    broken.write_bytes(b"user,item,timestamp\n")
    done = rec_dist("prepare", config, "data.prepare_on=ray", f"data.source={broken}", f"data.path={tmp_path / 'no'}")
    assert done.returncode == 2, done.stderr
    assert done.stderr.splitlines()[-1].startswith(f"error: data.source ({broken}) holds no readable row")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["broken.csv", "config.yaml", "memory", "ray"]
