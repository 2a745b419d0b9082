"""A ranking that is killed in the middle continues to the same bytes, and never from the parts of another ranking."""

import hashlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from finished_runs import finished_run

import rec_dist
from rec_dist.cli import main
from rec_dist.data.artifacts.recommendations import parts_in
from rec_dist.errors import UserError
from rec_dist.ranking import unfinished
from rec_dist.ranking.unfinished import parts_folder
from rec_dist.storage.files import lock, write_json

_ROOT = Path(__file__).parents[2]
# The command with blocks of 4 users. With a user in sys.argv[1]: a part for each block, and that user's takes for ever.
COMMAND = """
import sys, time
from rec_dist.ranking import rank, unfinished
from rec_dist.cli import main
slow_from, score = int(sys.argv[1]), rank._rank_block
rank.MOST_USERS, unfinished._SECONDS = 4, 0.0 if slow_from >= 0 else 1e9
def slowed(block, *more):
    if slow_from >= 0 and block.users[0] == f"{slow_from:03d}":
        time.sleep(600)
    return score(block, *more)
rank._rank_block = slowed
sys.exit(main(sys.argv[2:]))
"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("resumed"))


def start(words: Sequence[object], *, slow_from: int = -1) -> subprocess.Popen[str]:
    """`rec-dist rank WORDS` in a process of its own."""
    path = os.pathsep.join([str(_ROOT), str(_ROOT / "kernels")])
    command = [sys.executable, "-c", COMMAND, str(slow_from), "rank", *map(str, words)]
    return subprocess.Popen(command, env={**os.environ, "PYTHONPATH": path}, stderr=subprocess.PIPE, text=True)


def ended(process: subprocess.Popen[str]) -> tuple[int, str]:
    _, err = process.communicate(timeout=300)
    return process.returncode, err


def wait_for_parts(output: Path, users: int) -> None:
    deadline = time.monotonic() + 300
    while not (parts := parts_in(parts_folder(output))) or parts[-1].stop < users:
        assert time.monotonic() < deadline, "no part was written"
        time.sleep(0.05)


@pytest.mark.parametrize("name", ["recs.parquet", pytest.param("recs.jsonl", marks=pytest.mark.slow)])
def test_a_killed_command_continues_to_the_same_bytes(run: Path, tmp_path: Path, name: str) -> None:
    words = (run, "--top-k", 3, "--out")
    whole = tmp_path / "whole" / name
    code, err = ended(start([*words, whole]))
    assert code == 0, err
    output = tmp_path / "killed" / name
    killed = start([*words, output], slow_from=12)
    wait_for_parts(output, 12)
    killed.send_signal(signal.SIGKILL)
    assert ended(killed)[0] == -signal.SIGKILL
    assert not output.exists()
    code, err = ended(start([*words, output], slow_from=8))  # block 8 is done: it would wait if it were scored again
    assert code == 0, err
    assert "12 of 24 users are ranked already" in err
    assert output.read_bytes() == whole.read_bytes()
    assert [path.name for path in output.parent.iterdir()] == [name]


def test_another_ranking_does_not_continue_the_parts(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recs.parquet"
    killed = start([run, "--out", output], slow_from=8)
    wait_for_parts(output, 8)
    killed.kill()
    ended(killed)
    deny = tmp_path / "deny.txt"
    deny.write_text("00\n", encoding="utf-8")
    before = {path: path.read_bytes() for path in parts_folder(output).iterdir()}
    for words, different in (
        (["--top-k", "3"], "top_k"),
        (["--no-exclude-seen"], "exclude_seen"),
        (["--deny", str(deny)], "items"),
        (["--split", "test"], "users"),
    ):
        capsys.readouterr()
        assert main(["rank", str(run), "--out", str(output), *words]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert line.startswith("error: ") and f"{different}" in line and "another --out" in line
    assert {path: path.read_bytes() for path in parts_folder(output).iterdir()} == before
    assert not output.exists()


def test_two_commands_do_not_write_one_file(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recs.arrow"
    parts_folder(output).mkdir()
    held = lock(parts_folder(output) / ".lock")
    try:
        assert main(["rank", str(run), "--out", str(output)]) == 2
    finally:
        os.close(held)
    assert "another process" in capsys.readouterr().err.splitlines()[-1]
    assert main(["rank", str(run), "--out", str(output)]) == 0


def test_a_kill_between_the_last_two_steps_is_noticed(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The output has its name already, and only the folder of parts is left to remove."""
    output = tmp_path / "recs.jsonl"
    killed = start([run, "--out", output], slow_from=8)
    wait_for_parts(output, 8)
    killed.kill()
    ended(killed)
    output.write_text("whole\n", encoding="utf-8")
    code, err = ended(start([run, "--out", output]))
    assert code == 2 and "exists" in err and parts_in(parts_folder(output)), "a file of somebody else's"
    joined = {"bytes": 6, "sha256": hashlib.sha256(b"whole\n").hexdigest()}
    (parts_folder(output) / "joined.json").write_text(json.dumps(joined), encoding="utf-8")
    code, err = ended(start([run, "--out", output]))
    assert code == 0 and "ranked already" in err, err
    assert output.read_text(encoding="utf-8") == "whole\n" and not parts_folder(output).exists()
    assert main(["rank", str(run), "--out", str(output)]) == 2
    assert "exists" in capsys.readouterr().err.splitlines()[-1]


def test_damaged_parts_are_named(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    output = tmp_path / "recs.jsonl"
    parts_folder(output).mkdir()
    (parts_folder(output) / "key.json").write_text("{", encoding="utf-8")
    assert main(["rank", str(run), "--out", str(output)]) == 2
    assert "remove that folder" in capsys.readouterr().err.splitlines()[-1]


def test_an_empty_ranking_is_a_file_with_columns(run: Path, tmp_path: Path) -> None:
    """Every item of user 003 is seen or denied."""
    (tmp_path / "c.jsonl").write_text(json.dumps({"user_id": "003", "candidates": ["03"]}) + "\n", encoding="utf-8")
    table = pq.read_table(rec_dist.rank(run, candidates=tmp_path / "c.jsonl", out=tmp_path / "recs.parquet"))
    assert table.num_rows == 0 and table.column_names[0] == "user_id"


def test_users_of_a_damaged_part_are_ranked_again(run: Path, tmp_path: Path) -> None:
    output = tmp_path / "recs.jsonl"
    whole = tmp_path / "whole.jsonl"
    assert main(["rank", str(run), "--out", str(whole)]) == 0
    killed = start([run, "--out", output], slow_from=16)
    wait_for_parts(output, 16)
    killed.kill()
    ended(killed)
    second = parts_in(parts_folder(output))[1].path
    second.write_bytes(second.read_bytes()[:100])
    code, err = ended(start([run, "--out", output]))
    assert code == 0 and "4 of 24 users are ranked already" in err, err
    assert output.read_bytes() == whole.read_bytes()


def test_parts_that_another_ranking_leaves_meanwhile_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at the folder and its lock: these parts are of the best item alone."""
    output = tmp_path / "lists.parquet"

    def locks(path: Path) -> int:
        write_json(path.with_name("key.json"), {"top_k": 1})
        return lock(path)

    monkeypatch.setattr(unfinished, "lock", locks)
    with pytest.raises(UserError, match=r"another ranking \(different: top_k\)"), unfinished.unfinished(output, {"top_k": 2}):
        pytest.fail("it goes on from the parts of another ranking")
