"""Stages of a pipeline: exit codes and messages are those of the command alone, and a server that is gone is no hang."""

import os
import signal
from pathlib import Path

import pytest

from rec_dist.commands.stages import Stages, stages_forked
from rec_dist.errors import WorkerFailedError


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


def test_a_server_that_is_gone_is_an_error() -> None:
    from multiprocessing import Pipe

    here, there = Pipe()
    there.close()
    with here, pytest.raises(WorkerFailedError, match="was killed"):
        Stages(here).run(["recipes"])
