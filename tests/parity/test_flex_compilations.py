"""How often torch compiles FlexAttention as lengths and modes change: what Dynamo decides, without a compiler behind it (15 s).

A compilation takes about 15 s on a GPU. Batches of ever new lengths must not add any.
"""

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_prompts import random_tree

from rec_dist.models.flex import FLEX, PADDING, allow_compilations, num_compilations
from rec_dist.models.language import load_language_model
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts


@pytest.fixture
def dynamo_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs run as they are. FlexAttention rejects gradients on CPUs; the graph that Dynamo makes for them is the same there."""
    from torch.nn.attention import flex_attention
    from transformers.integrations.flex_attention import WrappedFlexAttention

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    monkeypatch.setattr(flex_attention, "_validate_device", lambda *arguments: None)
    monkeypatch.setattr(WrappedFlexAttention, "_instance", None)


def batch_of(rows: int) -> PackedBatch:
    """A batch of one long prompt and two short ones, of about `rows` rows."""
    rng = np.random.default_rng(rows)
    shapes = [(rows - 60, 2), (20, 1), (20, 3)]
    batch = pack_prompts([random_tree(rng, vocab_size=61, prompt=p, groups=g).grouped_prompt() for p, g in shapes])
    assert rows - 60 < batch.num_tokens <= rows + 60
    return batch


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own imports
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")  # Dynamo looks at it
@pytest.mark.usefixtures("dynamo_alone")
def test_nothing_is_compiled_after_the_second_length(tmp_path: Path) -> None:
    sizes = {"vocab_size": 61, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(**sizes, num_key_value_heads=2, max_position_embeddings=2048, bos_token_id=None)
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path)
    model: Any = load_language_model(tmp_path, dtype=torch.float32, attention="sdpa")
    model.set_attn_implementation(FLEX)
    scorer = Scorer(model, lambda logps, batch: (logps.sum(), logps.new_zeros(()), {}), ())
    allow_compilations()
    lengths, counts = [], []
    for rows in (200, 450, 700, 200, 950, 1200, 450):
        batch = batch_of(rows)
        scorer.train()
        scorer(batch)
        trained = num_compilations()
        scorer.eval()
        with torch.no_grad():
            scorer(batch)
        lengths.append(scorer.num_rows(batch))
        counts.append((trained, num_compilations()))
    assert all(length % PADDING == 0 for length in lengths) and len(set(lengths)) == 5
    first, second = counts[0], counts[1]
    assert 0 < first[0] < first[1] < second[0] < second[1]  # with a graph and without one
    assert counts[2:] == [(second[1], second[1])] * 5
