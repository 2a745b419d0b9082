"""launchers/: what `rec-dist submit` renders, what you may edit, and what a wheel carries."""

import json
import tomllib
from pathlib import Path

import pytest
from test_rendering import CONFIG, ROOT, rendered

from rec_dist.cli import main
from rec_dist.submit.templates import launchers

KEYS = {"slurm": ("submit.slurm.template", "slurm.sbatch.j2"), "kuberay": ("submit.kuberay.template", "kuberay.yaml.j2")}


@pytest.mark.parametrize("to", KEYS)
def test_an_edited_copy_of_a_template_is_rendered(to: str, tmp_path: Path) -> None:
    key, name = KEYS[to]
    copy = tmp_path / "mine.j2"
    copy.write_text((launchers() / name).read_text(encoding="utf-8") + "# {{ name }} and ${#words}\n", encoding="utf-8")
    added = "# rec-dist-sdpo-8b and ${#words}\n" if to == "slurm" else "# rec-dist-sdpo-8b-1 and ${#words}\n"
    assert rendered(to, f"{key}={copy}") == rendered(to) + added


@pytest.mark.parametrize("to", KEYS)
@pytest.mark.parametrize(
    ("text", "place"), [("a\n{% if %}\n", "line 2"), ("{{ nothing }}", "nothing"), ("{{ name + 1 }}", "str")]
)
def test_a_template_with_a_fault_is_named(
    to: str, text: str, place: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    key, name = KEYS[to]
    broken = tmp_path / "broken.j2"
    broken.write_text(text, encoding="utf-8")
    assert main(["submit", str(CONFIG), "--to", to, "--dry-run", f"{key}={broken}"]) == 2
    out, err = capsys.readouterr()
    assert not out
    assert [words for words in (key, str(broken), place, name) if words not in err] == []


def test_the_plain_ray_job_gives_a_run_as_long_to_stop_as_submit_does() -> None:
    """Uses the default of checkpoint.grace_seconds, which the script cannot read."""
    request = json.loads(rendered("ray").partition("\n\n# config.yaml")[0])
    seconds = request["runtime_env"]["env_vars"]["RAY_JOB_STOP_WAIT_TIME_S"]
    script = (ROOT / "launchers" / "ray_job.sh").read_text(encoding="utf-8")
    assert f'\\"RAY_JOB_STOP_WAIT_TIME_S\\": \\"{seconds}\\"' in script


def test_a_wheel_carries_the_folder_where_an_installed_package_looks_for_it() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["hatch"]["build"]
    assert settings["targets"]["wheel"]["force-include"]["launchers"] == "rec_dist/launchers"
    assert launchers() == ROOT / "launchers", "in a checkout the folder beside the package"
