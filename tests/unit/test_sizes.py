"""What every method says of its examples before it builds them is what the built ones have.

Ranks pack by it, and build only their own: a wrong size would overfill a micro-batch or divide a loss by another count.
"""

import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from p2rec_teacher import NUM_CATEGORIES, write_p2rec_teacher

from rec_dist.config.schema import DataConfig, RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.data.prepare.prepare import prepare
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.packing.sizes import Sizes

_TIMELINES = "train.targets_per_prompt=4"
_DELREC = (
    "task.kind=delrec_distill",
    "adapter.kind=soft_prompt",
    "prompt.num_virtual=4",
    "task.delrec.top_h=3",
    "task.delrec.teacher=random",
    "negatives.num=5",
)
CASES = {
    "sft": ("task.kind=sft",),
    "sdpo": ("task.kind=sdpo",),
    "dmpo with explicit negatives": ("task.kind=dmpo", "negatives.kind=low_rated", _TIMELINES),
    "dpo": ("task.kind=dpo", "negatives.num=1"),
    "recpo": ("task.kind=recpo", _TIMELINES),
    "popularity": ("task.kind=sdpo", "negatives.kind=popularity", "negatives.num=15"),
    "a crowded catalogue": ("task.kind=sdpo", "negatives.num=40"),
    "timelines": ("task.kind=sdpo", _TIMELINES, "negatives.num=5"),
    "timelines of all targets": ("task.kind=sft", "train.targets_per_prompt=50", "train.global_batch_size=50"),
    "timelines with a long end": ("task.kind=sdpo", _TIMELINES, "prompt.end=' | |\n\n'"),
    "timelines whose end reaches into the next title": (
        "task.kind=sdpo",
        _TIMELINES,
        "prompt.item_prefix=x",
        "prompt.end='x Silent'",
    ),
    "new negatives each epoch": ("task.kind=sdpo", "negatives.refresh_each_epoch=true", _TIMELINES),
    "chat": ("task.kind=sdpo", "prompt.style=chat", "prompt.end=<eos>"),
    "listed candidates": ("task.kind=sdpo", "prompt.candidates=listed", "evaluate.num_candidates=20"),
    "listed candidates in chat": ("task.kind=sft", "prompt.candidates=listed", "evaluate.num_candidates=20", "prompt.style=chat"),
    "listed candidates, new each epoch": (
        "task.kind=sdpo",
        "prompt.candidates=listed",
        "evaluate.num_candidates=20",
        "negatives.refresh_each_epoch=true",
    ),
    "one item of history": ("task.kind=sdpo", "prompt.max_history=1", _TIMELINES),
    "delrec": (
        "task.kind=delrec",
        "prompt.candidates=listed",
        "prompt.num_candidates=6",
        "evaluate.num_candidates=6",
        "negatives.num=5",
    ),
    "delrec_distill": _DELREC,
    "delrec_distill, temporal": (*_DELREC, "task.delrec.objectives=temporal", "negatives.refresh_each_epoch=true"),
    "delrec_distill, listed": (*_DELREC, "prompt.candidates=listed", "prompt.num_candidates=6", "evaluate.num_candidates=6"),
    "p2rec_reconstruct": ("task.kind=p2rec_reconstruct", f"task.p2rec.num_categories={NUM_CATEGORIES}"),
    "retrieval": ("task.kind=retrieval", "task.retrieval.width=8", _TIMELINES),
    "retrieval, one target a prompt": ("task.kind=retrieval", "task.retrieval.width=8", "task.retrieval.pooling=last"),
    "sequential": ("task.kind=sequential", "task.sequential.max_length=5"),
}


def check(task: Any) -> None:
    """Also that the sizes of some examples do not depend on the others that are asked with them."""
    number = task.sampler.num_examples
    indices, epochs = np.tile(np.arange(number), 2)[::-1].copy(), np.repeat([1, 0], number)
    drawn = task.data.draw(indices, epochs)
    chosen = list(range(0, len(indices), 3))[::-1]
    built = drawn.build(chosen)
    sizes = drawn.sizes
    some = task.data.draw(indices[chosen], epochs[chosen]).sizes
    assert len(built) == len(chosen)
    for field in fields(Sizes):
        found = getattr(sizes, field.name)
        assert (found.dtype, found.shape) == (np.int64, indices.shape)
        assert found[chosen].tolist() == [getattr(example, field.name) for example in built], field.name
        assert np.array_equal(getattr(some, field.name), found[chosen]), field.name


@pytest.fixture
def make_task(tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(*changes: str, teacher: Path | None = None) -> Any:
        config = tiny_config(tmp_path / "run", "train.max_tokens_per_micro_batch=4096", *changes)
        return build_task(RunConfig.model_validate(config), InitialWeights(tiny_model_dir, teacher=teacher), "cpu")

    return make


@pytest.mark.parametrize("name", sorted(CASES))
def test_sizes_are_those_of_the_built_examples(name: str, make_task: Callable[..., Any], tiny_data: Path, tmp_path: Path) -> None:
    teacher = write_p2rec_teacher(tmp_path / "teacher", PreparedData.open(tiny_data)) if name.startswith("p2rec") else None
    task = make_task(*CASES[name], teacher=teacher)
    check(task)
    if name.startswith("timelines"):  # otherwise nothing would have tested chosen items whose rows the prompt has
        prompts = task.data.draw(np.arange(20), np.zeros(20, dtype=np.int64)).build(range(20))
        assert any((prompt.input_lengths == 0).any() for prompt in prompts) == ("long end" not in name)


@pytest.mark.parametrize("kind", ["sft", "sdpo"])
def test_sizes_of_preference_rows(kind: str, make_task: Callable[..., Any], tmp_path: Path) -> None:
    """Rows with one, two or three rejected completions of different lengths."""
    words = ("Silent River", "Golden", "Last Letter of the Garden", "Paper")
    texts = [f" {words[place % 4]}" for place in range(16)]
    rows = [
        {"prompt": f"A user watched:{' x' * row}", "chosen": texts[row], "rejected": texts[row + 1 : row + 2 + row % 3]}
        for row in range(12)
    ]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(row) for row in rows), encoding="utf-8")
    prepare(DataConfig(source=str(tmp_path / "rows.jsonl"), path=str(tmp_path / "rows"), format="preferences"))
    check(make_task(f"task.kind={kind}", f"data.path={tmp_path / 'rows'}"))
