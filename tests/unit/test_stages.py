"""Stages of a pipeline: exit codes and messages are those of the command alone, and a server that is gone is no hang."""

import json
import os
import signal
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing import Pipe
from pathlib import Path

import pytest

from rec_dist.commands import run
from rec_dist.commands.stages import Stages, stages_forked
from rec_dist.errors import StopRequested, WorkerFailedError


def test_exit_codes_and_messages_are_those_of_the_command(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with stages_forked(preload=False) as stages:
        assert stages.run(["verify", str(tmp_path / "nothing")]) == 2
        assert capfd.readouterr().err.count("error: ") == 1
        assert stages.run(["recipes"]) == 0, "a stage that failed ends alone"
        assert "quickstart" in capfd.readouterr().out
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers


def test_a_stage_is_a_process_of_its_own() -> None:
    with stages_forked(preload=False) as stages:
        found = []
        for _ in range(2):
            stages._server.send_bytes(b'["--version"]')
            found.append(stages.answer())
            assert stages.answer() == 0
            assert not Path(f"/proc/{found[-1]}").exists(), "it is left as a zombie"
        assert len({*found, os.getpid()}) == 3


class TerminatedAtTheStart(Stages):
    """A SIGTERM comes before the stage has a process."""

    def answer(self) -> int:
        os.kill(os.getpid(), signal.SIGTERM)
        return super().answer()


def test_a_signal_before_the_stage_has_a_process_reaches_it(capfd: pytest.CaptureFixture[str]) -> None:
    with stages_forked(preload=False) as stages:
        assert TerminatedAtTheStart(stages._server).run(["recipes"]) == -signal.SIGTERM
        assert stages.run(["recipes"]) == 0 and not stages.stop_wanted


@pytest.mark.parametrize(("code", "where", "kept"), [(0, "after stage one", ["one"]), (-signal.SIGTERM, "in stage one", [])])
def test_a_stage_that_met_a_signal_is_the_last(
    code: int, where: str, kept: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it ended well all the same, or by the signal, as commands do that have nothing to save."""
    here, there = Pipe()
    for answer in (os.getpid(), code, os.getpid(), 0):
        there.send_bytes(json.dumps(answer).encode())

    class Terminated(Stages):
        def run(self, words: list[str]) -> int:
            self.stop_wanted = True
            return super().run(words)

    @contextmanager
    def forked(*, preload: bool) -> Iterator[Stages]:
        yield Terminated(here)

    monkeypatch.setattr(run, "stages_forked", forked)
    file = tmp_path / "pipeline.yaml"
    stages = ["{name: one, do: evaluate, target: quickstart:sft}", "{name: two, do: evaluate, target: quickstart:sdpo}"]
    file.write_text(f"pipeline: {{title: T, run_dir: {tmp_path}/report, stages: [{', '.join(stages)}]}}", encoding="utf-8")
    with here, there, pytest.raises(StopRequested, match=f"{where}; run the same command again"):
        run.run_pipeline(file, [])
    record = tmp_path / "report/stages.json"
    assert [row["name"] for row in (json.loads(record.read_text()) if record.is_file() else [])] == kept


def test_the_stage_of_a_server_that_is_gone_is_stopped() -> None:
    here, there = Pipe()
    with here, subprocess.Popen(["sleep", "60"]) as stage:
        there.send_bytes(json.dumps(stage.pid).encode())
        with socket.socket(fileno=os.dup(there.fileno())) as server, there:
            server.shutdown(socket.SHUT_WR)  # no exit code follows
            with pytest.raises(WorkerFailedError, match="was killed"):
                Stages(here).run(["recipes"])
        try:
            assert stage.wait(timeout=5) == -signal.SIGTERM
        finally:
            stage.kill()


def test_a_server_that_is_gone_is_an_error() -> None:
    here, there = Pipe()
    there.close()
    with here, pytest.raises(WorkerFailedError, match="was killed"):
        Stages(here).run(["recipes"])
