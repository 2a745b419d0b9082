"""A scorer that computes the preference loss inside the head equals one whose loss follows the head.

Loss, log-probs, sums and gradients must agree.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from random_prompts import random_tree
from torch import Tensor

from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.preference import dmpo, dynamicpo, mppo, recpo, sdpo
from rec_dist.models.language import load_language_model
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts


def no_margins(split: Any, keys: Any, completions: Any) -> Any:
    raise AssertionError("the batch brings its own")


METHODS = {
    "sdpo": sdpo(beta=0.3, num_negatives=3),
    "dmpo": dmpo(beta=0.3, num_negatives=3),
    "mppo": mppo(beta=3.0, num_negatives=3),
    "dynamicpo": dynamicpo(beta=0.3, num_negatives=3),
    "recpo": recpo(no_margins, beta=0.3, num_negatives=3),
}


def batch() -> PackedBatch:
    rng = np.random.default_rng(0)
    packed = pack_prompts([random_tree(rng, vocab_size=320, prompt=11, groups=3).grouped_prompt() for _ in range(2)])
    return packed.with_reference(torch.from_numpy(rng.normal(-20, 5, size=len(packed.reference_logps))))


def scored(folder: Path, method: Objective, micro_batch: PackedBatch, *, inside: bool) -> tuple[list[Tensor], dict[str, Tensor]]:
    model = load_language_model(folder, dtype=torch.float32)
    scorer = Scorer(model, method.loss, method.metric_names, method.preference if inside else None).train()
    loss_sum, sums, logps = scorer(micro_batch)
    (loss_sum / 3).backward()
    gradients = {name: parameter.grad for name, parameter in scorer.named_parameters() if parameter.grad is not None}
    return [loss_sum.detach(), sums, logps.detach()], gradients


@pytest.mark.parametrize("name", sorted(METHODS))
@pytest.mark.parametrize("weighted", [False, True])
def test_inside_or_after_the_head_is_the_same(tiny_model_dir: Path, name: str, weighted: bool) -> None:
    micro_batch = batch()
    if name == "recpo":
        micro_batch = replace(micro_batch, margins=torch.linspace(0, 3, len(micro_batch.reference_logps)))
    if weighted:
        micro_batch = replace(micro_batch, weights=torch.linspace(0, 1.5, len(micro_batch.weights)))
    after, after_gradients = scored(tiny_model_dir, METHODS[name], micro_batch, inside=False)
    inside, inside_gradients = scored(tiny_model_dir, METHODS[name], micro_batch, inside=True)
    for ours, expected in zip(inside, after, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-6, atol=1e-6)
    assert inside_gradients.keys() == after_gradients.keys()
    assert len(inside_gradients) > 10
    for parameter, gradient in inside_gradients.items():
        torch.testing.assert_close(gradient, after_gradients[parameter], rtol=1e-5, atol=1e-7)
    assert float(after[0]) > 0


def test_a_dummy_batch_adds_nothing_and_has_a_graph(tiny_model_dir: Path) -> None:
    (loss, sums, _), gradients = scored(tiny_model_dir, METHODS["sdpo"], dummy_batch(3), inside=True)
    assert float(loss) == 0
    assert sums.abs().sum() == 0
    assert gradients
    assert all(gradient.abs().sum() == 0 for gradient in gradients.values())


def test_the_language_task_hands_the_loss_to_the_head() -> None:
    for name, method in METHODS.items():
        assert method.preference == ("sdpo" if name == "recpo" else name, 3.0 if name == "mppo" else 0.3)
