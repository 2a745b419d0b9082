"""The softmax over the catalogue is a distribution over its titles: their probabilities after any history add up to 1."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from rec_dist.config.schema import PromptConfig
from rec_dist.data.prompts.builder import build_prompt_builder
from rec_dist.data.prompts.title_trie import catalogue_packing
from rec_dist.models.language import load_language_model
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts

TITLES = [f"{first} {second}" for first in ("Silent", "Golden", "Last", "Paper") for second in ("River", "Empire", "Letter")]
TITLES += ["Silent", "Silent River of Gold", "Golden River of Gold", "Winter"]


def no_loss(logps: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    return logps.sum() * 0, logps.new_zeros(()), {}


@pytest.mark.parametrize("temperature", [1.0, 3.0])
def test_the_probabilities_of_all_titles_add_up_to_one(tiny_model_dir: Path, tiny_tokenizer: Any, temperature: float) -> None:
    builder = build_prompt_builder(PromptConfig(max_history=3, instruction="A user watched:"), tiny_tokenizer, TITLES)
    every = np.arange(len(TITLES), dtype=np.int32)
    histories = [every[:3], every[5:6], every[[9, 2]]]
    prompts = [builder.grouped_prompt(history, [every], [key]) for key, history in enumerate(histories)]
    scorer = Scorer(load_language_model(tiny_model_dir, dtype=torch.float32), no_loss, ()).eval()
    with torch.no_grad():
        scores = scorer(catalogue_packing(builder, temperature)(prompts))[2].view(len(histories), -1)
        usual = scorer(pack_prompts(prompts))[2].view(len(histories), -1)
    torch.testing.assert_close(scores.exp().sum(dim=1), torch.ones(len(histories)), rtol=1e-5, atol=0)
    assert (usual.exp().sum(dim=1) < 0.01).all(), "the model's own mass is elsewhere"
    if temperature == 1.0:
        assert (scores >= usual).all()
