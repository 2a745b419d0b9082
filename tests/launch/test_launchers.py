"""launchers/ for those who prefer plain sbatch, `ray job submit` and kubectl: the same text as what rec-dist sends."""

import contextlib
import io
import json
import shlex

import pytest
from test_rendering import BODY, ROOT, rendered

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


def test_plain_launchers_give_a_run_as_long_to_stop_as_submit_does() -> None:
    """With the default of checkpoint.grace_seconds, which stands in none of them."""
    request = json.loads(rendered("ray").partition("\n\n# config.yaml")[0])
    seconds = request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    told = {
        name: (ROOT / "launchers" / name).read_text(encoding="utf-8") for name in ("ray_job.sh", "slurm.sbatch", "rayjob.yaml")
    }
    assert f'\\"RAY_JOB_STOP_WAIT_TIME_S\\": \\"{seconds}\\"' in told["ray_job.sh"]
    assert f"\n#SBATCH --signal=B:USR1@{seconds}\n" in told["slurm.sbatch"]
    assert told["rayjob.yaml"].count(f"terminationGracePeriodSeconds: {seconds}\n") == 2
