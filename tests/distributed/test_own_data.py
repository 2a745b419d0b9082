"""The example of one's own data runs from orders to a ranked file, with the commands that its page shows."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.mark.slow
def test_from_orders_to_a_ranked_file(tmp_path: Path) -> None:
    folder = tmp_path / "shop"
    words = [sys.executable, str(ROOT / "examples" / "own_data.py"), "--users", "300", "--folder", str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stderr
    rows = json.loads((folder / "times.json").read_text(encoding="utf-8"))["rows"]
    page = (ROOT / "docs" / "own_data.md").read_text(encoding="utf-8")
    shown = re.findall(r"^rec-dist +(\w+) +(examples|shop)/", page, re.MULTILINE)[:7]
    assert [row["command"].split()[1] for row in rows] == [command for command, _ in shown]
    ranked = pq.read_table(folder / "recommendations.parquet")
    assert ranked.num_rows == 10 * len(set(ranked["user_id"].to_pylist())) >= 2000
