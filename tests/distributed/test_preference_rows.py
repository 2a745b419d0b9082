"""Training on preference rows with different numbers of rejected completions: real runs on 1 and 2 workers."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

from rec_dist.commands.export import export
from rec_dist.config.schema import DataConfig
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UserError

_WORDS = ("Silent River", "Golden Garden", "Last Letter", "Broken Empire", "Hidden Mirror", "Electric Harbour")
_NUM_REJECTED = [1 + row % 3 for row in range(24)]


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 rows with 1, 2 or 3 rejected completions; the chosen one is always the next of the first word list."""
    folder = tmp_path_factory.mktemp("rows")
    lines = []
    for row, count in enumerate(_NUM_REJECTED):
        texts = [f" {_WORDS[(row + place) % len(_WORDS)]}" for place in range(1 + count)]
        lines.append({"prompt": f"A user watched:\n- {_WORDS[row % 5]}\n-", "chosen": texts[0], "rejected": texts[1:]})
    (folder / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    config = DataConfig(source=str(folder / "rows.jsonl"), path=str(folder / "out"), format="preferences")
    prepare(config)
    return folder / "out"


@pytest.mark.parametrize("kind", ["sdpo", "dmpo", "mppo", "dynamicpo", "sft"])
def test_the_loss_begins_where_it_must_and_falls(trainer: Any, rows: Path, kind: str) -> None:
    changes = (f"task.kind={kind}", f"data.path={rows}", "train.global_batch_size=24", "train.max_steps=6", "train.epochs=6")
    one = trainer.train(trainer.new_dir(), *changes)
    two = trainer.train(trainer.new_dir(), *changes, "train.max_tokens_per_micro_batch=64", workers=2)
    first = one.steps[0]["loss"]
    if kind == "sdpo":  # with the policy at the reference, a row with K rejected completions costs log(1 + K)
        assert first == pytest.approx(sum(math.log(1 + count) for count in _NUM_REJECTED) / len(_NUM_REJECTED), abs=1e-5)
    if kind in ("dmpo", "dynamicpo"):
        assert first == pytest.approx(math.log(2), abs=1e-5)
    # MPPO compares likelihoods, and those of a random model are near 0.
    assert one.steps[-1]["loss"] < first - (0 if kind == "mppo" else 0.01)
    assert [row["groups"] for row in one.steps] == [24] * 6
    assert [row["loss"] for row in two.steps] == pytest.approx([row["loss"] for row in one.steps], abs=1e-4)
    saved = {path.name for path in (one.path / "model").iterdir()}
    assert {"completions.json", "adapter_model.safetensors"} <= saved
    assert "prompt.json" not in saved
    export(one.path, one.path / "merged", kind="merged")
    with pytest.raises(UserError, match=r"--format vllm .* use --format merged"):
        export(one.path, one.path / "vllm", kind="vllm")
    merged = {path.name for path in (one.path / "merged").iterdir()}
    assert {"completions.json", "model.safetensors", "tokenizer.json"} <= merged
