"""The code of docs/python.md and docs/tour.ipynb runs, from first block to last, on tiny data and with real training."""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

DOCS = Path(__file__).resolve().parents[2] / "docs"
BLOCK = re.compile(r"^```python\n(.*?)^```", re.MULTILINE | re.DOTALL)
# All blocks share one namespace, as for a reader. The value that a test asks for is printed as JSON.
RUN = """
import json, sys
from pathlib import Path
namespace = {"__name__": "__main__"}
for number, block in enumerate(json.loads(Path("blocks.json").read_text())):
    exec(compile(block, f"block {number}", "exec"), namespace)
print(json.dumps(eval(sys.argv[1], namespace)))
"""


def run_blocks(blocks: list[str], folder: Path, result: str) -> Any:
    (folder / "blocks.json").write_text(json.dumps(blocks), encoding="utf-8")
    command = [sys.executable, "-c", RUN, result]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=600, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def blocks_of_page() -> list[str]:
    return BLOCK.findall((DOCS / "python.md").read_text(encoding="utf-8"))


@pytest.fixture
def folder(tmp_path: Path, tiny_config: Callable[..., dict[str, Any]], tiny_source: Path) -> Path:
    """A folder with config.yaml and interactions.csv, as docs/python.md requires."""
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(tiny_config("runs/first")), encoding="utf-8")
    shutil.copyfile(tiny_source, tmp_path / "interactions.csv")
    return tmp_path


@pytest.mark.slow
@pytest.mark.quick
def test_the_page_of_the_python_api_runs(folder: Path) -> None:
    blocks = blocks_of_page()
    for name in ("prepare", "train", "evaluate", "rank", "distil", "score", "register_method"):
        assert any(f"rec_dist.{name}(" in block for block in blocks), name
    found = run_blocks(
        blocks,
        folder,
        "[len(run.metrics('step')), metrics['hr@1']['n'] > 0, [t.tolist() for t in logps], [t.tolist() for t in same]]",
    )
    assert found[:2] == [2, True] and found[2] == found[3] and [len(sums) for sums in found[2]] == [2, 1]


def test_the_score_part_runs_alone(folder: Path, tiny_model_dir: Path) -> None:
    """Without training: its model and tokenizer are those of the tiny base model."""
    blocks = [block for block in blocks_of_page() if "rec_dist.score(" in block]
    assert len(blocks) == 2
    prelude = f"""
import rec_dist
from transformers import AutoModelForCausalLM
class run: model_path = {str(tiny_model_dir)!r}
"""
    first = blocks[0].replace("from peft import AutoPeftModelForCausalLM", "").replace("AutoPeftModel", "AutoModel")
    found = run_blocks([prelude, first, blocks[1]], folder, "[[t.tolist() for t in logps], [t.tolist() for t in same]]")
    assert found[0] == found[1] and all(value < 0 for sums in found[0] for value in sums)


def test_the_notebook_is_one() -> None:
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    assert (notebook["nbformat"], notebook["nbformat_minor"]) == (4, 5)
    identities = [cell["id"] for cell in notebook["cells"]]
    assert len(set(identities)) == len(identities)
    for cell in notebook["cells"]:
        wanted = {"cell_type", "id", "metadata", "source"}
        wanted |= {"execution_count", "outputs"} if cell["cell_type"] == "code" else set()
        assert set(cell) == wanted and all(isinstance(line, str) for line in cell["source"])


@pytest.mark.slow
def test_the_notebook_runs_and_what_was_chosen_is_near_the_top(tmp_path: Path) -> None:
    notebook = json.loads((DOCS / "tour.ipynb").read_text(encoding="utf-8"))
    blocks = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    found = run_blocks(blocks, tmp_path, "[losses[0], losses[-1], ranking['title'].tolist().index(watched[-1]), len(ranking)]")
    assert found[1] < found[0] - 1
    assert found[2] < 5 < found[3]
