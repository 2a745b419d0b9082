"""Text of others on a terminal: no title, id, header, path or reason can hide a line, colour it or write another one."""

import io
import json
import logging
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rec_dist.cli import main
from rec_dist.commands.evaluate import table_of
from rec_dist.commands.progress import watching
from rec_dist.data.artifacts.recommendations import ItemColumns, write_lines
from rec_dist.report.table import ComparisonRow, Difference
from rec_dist.report.text_table import text_table
from rec_dist.runtime.messages import messages_to, say, visible
from rec_dist.runtime.run_directory import RunDirectory

HOSTILE = "\x1b]0;mine\x07\x1b[2J\r\x9b31m\u202egnp\u2066\x7f\x00"
OBEYED = set(HOSTILE) - set("]0;mine[2J31mgnp")


def harmless(text: str) -> bool:
    return not OBEYED & set(text) and "\\x1b[2J" in text


@given(st.text())
def test_what_is_visible_holds_nothing_that_a_terminal_obeys(text: str) -> None:
    shown = visible(text)
    assert not any((ord(c) < 32 and c not in "\n\t") or 127 <= ord(c) < 160 or 0xD800 <= ord(c) < 0xE000 for c in shown)
    assert not set("\u061c\u200e\u200f\u2028\u2029\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069") & set(shown)
    shown.encode("utf-8")
    assert visible(shown) == shown


@pytest.mark.parametrize("text", ["Amélie", "千と千尋の神隠し", "a\tb\nc", "👩\u200d👩\u200d👧", "\u0646\u200c\u0645", "C:\\x1b"])
def test_ordinary_titles_stay_as_they_are(text: str) -> None:
    assert visible(text) == text


def test_a_header_in_an_error_of_prepare(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    source = tmp_path / "interactions.csv"
    source.write_text(f"user,{HOSTILE.replace(chr(0), '').replace(chr(13), '')}\nu1,1\n", encoding="utf-8")
    config = tmp_path / "run.yaml"
    config.write_text(f"data: {{source: {source}, format: csv, path: {tmp_path / 'p'}}}\ntrain: {{run_dir: {tmp_path / 'r'}}}\n")
    assert main(["prepare", str(config)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert harmless(error)
    assert error.count("\n") == 1


def test_a_path_in_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["train", HOSTILE.replace("\0", "")]) == 2
    assert harmless(capsys.readouterr().err)


def test_a_name_in_the_tables(capsys: pytest.CaptureFixture[str]) -> None:
    metric = {"value": 0.5, "low": 0.4, "high": 0.6, "n": 9}
    say(table_of({"name": HOSTILE, "metrics": {"hr@1": metric}, "parts": {}}))
    assert harmless(capsys.readouterr().out)
    pair = Difference(HOSTILE, "other", "hr@1", metric)
    assert harmless(text_table([ComparisonRow(HOSTILE, {"hr@1": metric})], [pair])), "table.txt is read on terminals too"


def failed_run(folder: Path) -> RunDirectory:
    run = RunDirectory(folder)
    folder.mkdir()
    run.config_path.write_text("{}\n")
    run.append({"event": "failed", "step": 3, "reason": f"title {HOSTILE}\ncheckpoint  after step 9"})
    return run


def test_a_reason_in_status_is_one_harmless_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = failed_run(tmp_path / "run")
    assert main(["status", str(run.path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert harmless("\n".join(lines))
    assert [line for line in lines if line.startswith("checkpoint")] == ["checkpoint  none"], "a line feed writes no line"


def test_a_bad_step_in_the_log_and_in_what_watches_it(tmp_path: Path) -> None:
    run, out = failed_run(tmp_path / "run"), io.StringIO()
    with watching(run, out):
        run.log(f"WARNING: user {HOSTILE}")
        with (run.path / "log.txt").open("a", encoding="utf-8") as log:  # as another version, or somebody else, writes it
            log.write(f"2026-01-01 00:00:00 title {HOSTILE}\n")
        run.progress("train", 1, 2, note=HOSTILE)
    shown = out.getvalue()
    assert harmless(shown)
    assert shown.count("\\u202egnp") == 3
    own = (run.path / "log.txt").read_text(encoding="utf-8").splitlines()[0]
    assert harmless(own)


def test_a_message_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    from rec_dist.cli import _to_stderr

    with messages_to(_to_stderr):
        logging.getLogger("rec_dist.data").warning("title %s", HOSTILE)
    assert harmless(capsys.readouterr().err)


def test_metrics_hold_escapes_as_json(tmp_path: Path) -> None:
    run = failed_run(tmp_path / "run")
    assert not OBEYED & set(run.metrics_path.read_text(encoding="utf-8"))
    assert HOSTILE in json.loads(run.metrics_path.read_text(encoding="utf-8"))["reason"]


def test_rows_as_json_lines_hold_nothing_hostile_and_read_back_the_same() -> None:
    out = io.StringIO()
    columns = ItemColumns(["i0"], [HOSTILE])
    one, zero = np.ones(1, dtype=np.int32), np.zeros(1, dtype=np.int64)
    batch = columns.batch([HOSTILE], zero, one, zero.astype(np.int32), np.asarray([-np.inf]), np.asarray([False]), {})
    write_lines(batch, out)
    assert not OBEYED & set(out.getvalue().rstrip("\n")) and out.getvalue().count("\n") == 1
    row = json.loads(out.getvalue())
    assert (row["user_id"], row["title"], row["item_id"], row["score"]) == (HOSTILE, HOSTILE, "i0", None)
