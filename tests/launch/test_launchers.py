"""launchers/ for those who prefer plain sbatch, `ray job submit` and kubectl: the same text as what rec-dist sends."""

import contextlib
import io
import shlex

import pytest
from test_rendering import BODY, ROOT

from rec_dist.cli import main


def test_the_batch_script_has_the_body_of_every_rendered_one() -> None:
    assert (ROOT / "launchers" / "slurm.sbatch").read_text(encoding="utf-8").endswith(BODY)


def test_the_manifest_is_what_its_first_line_renders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    lines = (ROOT / "launchers" / "rayjob.yaml").read_text(encoding="utf-8").splitlines(keepends=True)
    words = shlex.split(lines[0].removeprefix("# rec-dist "))
    out = io.StringIO()
    with contextlib.redirect_stdout(out):
        assert main(words) == 0
    assert out.getvalue() == "".join(line for line in lines if not line.startswith("#"))
