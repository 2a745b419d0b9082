"""An installed wheel works away from the checkout: it carries the recipes, plans, prepares and trains."""

import os
import subprocess
import sys
import sysconfig
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow  # builds a wheel, makes an environment and trains


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The rec-dist of a fresh environment with the wheel. Other packages come from this environment; nothing is downloaded."""
    folder = tmp_path_factory.mktemp("wheel")
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", str(folder), str(ROOT)]
    run(build, folder)
    wheel = next(folder.glob("rec_dist-*.whl"))
    names = zipfile.ZipFile(wheel).namelist()
    assert "rec_dist/configs/recipes/quickstart.yaml" in names and "rec_dist_kernels/__init__.py" in names
    assert not [name for name in names if name.startswith(("configs/", "tests/"))]
    run([sys.executable, "-m", "venv", "--without-pip", str(folder / "env")], folder)
    python = folder / "env" / "bin" / "python"
    run([*pip, f"--python={python}", "install", "--quiet", "--no-deps", "--no-index", str(wheel)], folder)
    packages = folder / "env" / "lib" / f"python{sys.version_info.major}.{sys.version_info.minor}" / "site-packages"
    # Only sys.path is extended: the .pth file of an editable install is not read, so rec_dist can only come from the wheel.
    (packages / "others.pth").write_text(f"{sysconfig.get_paths()['purelib']}\n", encoding="utf-8")
    where = run([str(python), "-c", "import rec_dist, rec_dist_kernels as k; print(rec_dist.__file__, k.__file__)"], folder)
    assert [Path(path).is_relative_to(packages) for path in where.split()] == [True, True]
    return folder / "env" / "bin" / "rec-dist"


def run(words: list[str], folder: Path) -> str:
    """What a command prints. The command must succeed."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(words, cwd=folder, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, f"{words}\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
    return done.stdout


def test_recipes_are_listed_copied_and_planned(installed: Path, tmp_path: Path) -> None:
    assert "quickstart" in run([str(installed), "recipes"], tmp_path)
    run([str(installed), "init", "llama3-8b", "mine.yaml"], tmp_path)
    assert "runs:" in (tmp_path / "mine.yaml").read_text(encoding="utf-8")
    own, shipped = (
        run([str(installed), "plan", name, "data.path=nowhere"], tmp_path) for name in ("mine.yaml:sdpo", "llama3-8b:sdpo")
    )
    assert "8 x H100" in own
    assert own == shipped


def test_a_copied_recipe_prepares_and_trains(
    installed: Path, tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path
) -> None:
    """The copied quickstart with tiny data and a tiny model, in a file that extends it."""
    run([str(installed), "init", "quickstart", "mine.yaml"], tmp_path)
    tiny = tiny_config("runs/tiny", {"data.path": "data/tiny", "train.targets_per_prompt": 2})
    (tmp_path / "tiny.yaml").write_text(yaml.safe_dump({"extends": "mine.yaml", "runs": {"sft": tiny}}), encoding="utf-8")
    run([str(installed), "prepare", "tiny.yaml:sft"], tmp_path)
    run([str(installed), "train", "tiny.yaml:sft"], tmp_path)
    written = yaml.safe_load((tmp_path / "runs" / "tiny" / "config.yaml").read_text(encoding="utf-8"))
    assert (written["model"]["path"], written["optimizer"]["warmup_steps"]) == (str(tiny_model_dir), 5)
    assert (tmp_path / "runs" / "tiny" / "model" / "adapter_model.safetensors").is_file()
