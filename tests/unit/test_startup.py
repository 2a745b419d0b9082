"""What commands import before they work. Every library here costs a tenth of a second or more (benchmarks/startup.py).

Each command runs in a process of its own, because the process of the tests has imported everything.
"""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml

_SCRIPT = """
import json, sys
from rec_dist.cli import main
code = main(json.loads(sys.argv[1]))
names = {name for name, module in sys.modules.items() if module}
print("\\n" + json.dumps([code, sorted({name.split(".")[0] for name in names} | names & {"torch._dynamo"})]))
"""
_ELSEWHERE = {"ray", "sklearn", "pandas", "matplotlib", "mlflow", "wandb", "tensorboardX"}
_TRAINING = {"deepspeed", "scipy", "triton", *_ELSEWHERE}
_MODELS = {"transformers", "peft", "accelerate", "tokenizers", "huggingface_hub", "torch._dynamo", "sympy"}
_DATA = {"numpy", "pyarrow", "torch", "safetensors", "jinja2"}


def imported(*words: str) -> set[str]:
    """The packages in sys.modules after `rec-dist WORDS`."""
    line = [sys.executable, "-c", _SCRIPT, json.dumps(words)]
    done = subprocess.run(line, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1"}, check=False)
    assert done.returncode == 0, done.stderr
    code, names = json.loads(done.stdout.splitlines()[-1])
    assert code == 0, done.stderr
    return set(names)


def test_version_and_help_import_nothing_large() -> None:
    everything = _TRAINING | _MODELS | _DATA | {"omegaconf", "pydantic"}
    line = [sys.executable, "-X", "importtime", "-m", "rec_dist", "--help"]
    done = subprocess.run(line, capture_output=True, text=True, check=True)
    found = {row.rpartition("|")[2].strip().partition(".")[0] for row in done.stderr.splitlines()}
    assert "rec_dist" in found
    assert not found & everything


def test_a_plan_builds_no_model() -> None:
    words = ("plan.cluster=8xh100", "plan.model=llama3-8b", "train.max_steps=10", "data.path=nowhere")
    found = imported("plan", "llama3-8b:sdpo", *words)
    assert "torch" in found
    assert not found & (_TRAINING | _MODELS)


def test_a_run_imports_no_launcher_no_report_and_no_tracker(tiny_config: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", "train.max_steps=1")), encoding="utf-8")
    found = imported("train", str(path))
    assert {"deepspeed", "transformers", "peft"} <= found
    assert not found & _ELSEWHERE
    assert json.loads((tmp_path / "run" / "finished.json").read_text(encoding="utf-8"))["step"] == 1
