"""FlexAttention sees exactly what the dense mask lets it see, and gives the same scores. The dense mask is the oracle.

On a CPU, FlexAttention has a forward pass but no backward pass, and runs uncompiled, so that a test takes milliseconds.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_prompts import random_tree
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.models.attention import visible
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.flex import BLOCK, FLEX, PADDING, block_mask, mask_mod, num_compilations, padded_length
from rec_dist.models.language import load_language_model
from rec_dist.models.per_prompt import PER_PROMPT
from rec_dist.models.scorer import Scorer
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts

VOCAB, WINDOW = 61, 5
SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
SOFT = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0, "head_dim": 16, "query_pre_attn_scalar": 16}


def configs() -> dict[str, Any]:
    mixed = ["sliding_attention", "full_attention"]
    return {
        "llama": transformers.LlamaConfig(**SHAPE),
        "qwen2": transformers.Qwen2Config(**SHAPE, tie_word_embeddings=True),
        "gemma2": transformers.Gemma2Config(**SHAPE, **SOFT, sliding_window=WINDOW, layer_types=mixed),
        "mistral": transformers.MistralConfig(**SHAPE, sliding_window=WINDOW),
    }


@pytest.fixture
def uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    """FlexAttention's own definition instead of the kernel that torch.compile would make of it: the same function, slower."""
    from torch.nn.attention.flex_attention import flex_attention
    from transformers.integrations import flex_attention as module

    monkeypatch.setattr(
        module, "compile_friendly_flex_attention", lambda *args, training, **kwargs: flex_attention(*args, **kwargs)
    )


def batch_of(seed: int, *, trees: int = 6, prompt: int = 60, long: tuple[int, ...] = ()) -> PackedBatch:
    """`trees` prompts of up to `prompt` tokens, then prompts of the lengths in `long`."""
    rng = np.random.default_rng(seed)
    shapes = [(int(rng.integers(1, prompt)), int(rng.integers(1, 5))) for _ in range(trees)] + [(n, 3) for n in long]
    return pack_prompts([random_tree(rng, vocab_size=VOCAB, prompt=p, groups=g).grouped_prompt() for p, g in shapes])


def pairs_of(batch: PackedBatch, window: int | None) -> Tensor:
    """The mask function on every pair, as create_block_mask would call it."""
    rows = torch.arange(batch.num_tokens)
    zero = torch.zeros((), dtype=torch.int64)
    return mask_mod(batch, window=window)(zero, zero, rows[:, None], rows[None, :])


@pytest.mark.parametrize("window", [None, 1, WINDOW, 40])
@pytest.mark.parametrize("seed", range(8))
def test_the_mask_function_is_the_dense_mask(seed: int, window: int | None) -> None:
    batch = batch_of(seed)
    assert torch.equal(pairs_of(batch, window), visible(batch, window=window))


@pytest.mark.parametrize("window", [None, WINDOW, 40])
@pytest.mark.parametrize("seed", range(4))
def test_blocks_hold_what_is_visible(seed: int, window: int | None) -> None:
    """Full blocks are full, partial ones neither full nor empty, and all others empty, as in torch's own builder."""
    from torch.nn.attention.flex_attention import create_block_mask

    batch = batch_of(seed, trees=12, prompt=200, long=(600, 130))
    batch = batch.padded_to(padded_length(batch.num_tokens) + BLOCK)
    made = block_mask(batch, window=window)
    length = batch.num_tokens
    torchs = create_block_mask(mask_mod(batch, window=window), None, None, length, length, device="cpu")
    assert made.shape == (1, 1, length, length)
    assert torch.equal(made.to_dense(), torchs.to_dense())
    for name in ("kv_num_blocks", "full_kv_num_blocks", "q_num_blocks", "full_q_num_blocks"):
        assert torch.equal(getattr(made, name), getattr(torchs, name)), name
    for count, index in (
        ("kv_num_blocks", "kv_indices"),
        ("full_kv_num_blocks", "full_kv_indices"),
        ("q_num_blocks", "q_indices"),
    ):
        used = torch.arange(length // BLOCK) < getattr(made, count)[..., None]
        assert torch.equal(getattr(made, index)[used], getattr(torchs, index)[used]), index
    if window is None:
        assert int(made.full_kv_num_blocks.sum()) > 0  # otherwise full blocks would never be tested


@pytest.mark.parametrize("batch", [batch_of(3), dummy_batch(3)], ids=["packed batch", "dummy batch"])
def test_padding_sees_itself_alone_and_nobody_sees_it(batch: PackedBatch) -> None:
    length = batch.num_tokens
    padded = batch.padded_to(length + 70)
    mask = visible(padded)
    assert torch.equal(mask[:length, :length], visible(batch))
    assert not mask[:length, length:].any() and torch.equal(mask[length:, length:], torch.eye(70, dtype=torch.bool))
    assert not mask[length:, :length].any()
    assert torch.equal(padded.rows, batch.rows) and batch.padded_to(length) is batch
    with pytest.raises(AssertionError, match="does not fit"):
        batch.padded_to(length - 1)


@pytest.mark.parametrize("name", sorted(configs()))
@pytest.mark.usefixtures("uncompiled")
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile:UserWarning")
def test_flex_scores_as_the_dense_mask_does(name: str, tmp_path: Path) -> None:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        transformers.AutoModelForCausalLM.from_config(configs()[name]).save_pretrained(tmp_path)
    scores = {}
    loss: Callable[..., Any] = lambda logps, batch: (logps.sum(), logps.new_zeros(()), {})
    for way in ("dense", FLEX):
        model: Any = load_language_model(tmp_path, dtype=torch.float32, attention="sdpa")
        if way == FLEX:
            model.set_attn_implementation(FLEX)
        scorer = Scorer(model, loss, ())
        with torch.no_grad():
            scores[way] = torch.cat([scorer(batch)[2] for batch in (batch_of(0), batch_of(1, trees=1, prompt=9))])
        length = batch_of(0).num_tokens
        assert scorer.num_rows(batch_of(0)) == (padded_length(length) if way == FLEX else length)
    assert float(scores["dense"].std()) > 0.1  # otherwise a wrong mask could not be distinguished from a right one
    assert float((scores["dense"] - scores[FLEX]).abs().max()) <= 1e-4


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")  # torch.compile's own imports
def test_one_compilation_serves_every_packed_batch_of_a_length(tmp_path: Path) -> None:
    """The kernel itself, compiled for the CPU (30 s). Other batches, or switching to evaluation, add no graph.

    One length only: with lengths as variables, torch 2.13 generates C++ that no compiler takes. test_flex_compilations.py
    changes them.
    """
    transformers.AutoModelForCausalLM.from_config(configs()["gemma2"]).save_pretrained(tmp_path)
    models: list[Any] = [load_language_model(tmp_path, dtype=torch.float32, attention="sdpa") for _ in range(2)]
    models[1].set_attn_implementation(FLEX)
    dense, flex = (Scorer(model, lambda a, b: (a.sum(), a.new_zeros(()), {}), ()) for model in models)
    counts = []
    for seed in range(4):
        flex.train(seed % 2 == 1)
        batch = batch_of(seed).padded_to(2 * PADDING)
        with torch.no_grad():
            assert float((flex(batch)[2] - dense(batch)[2]).abs().max()) <= 1e-4
        counts.append(num_compilations())
    assert counts[0] > 0 and counts == [counts[0]] * 4


def test_a_wrong_mask_would_be_seen(tmp_path: Path) -> None:
    """Without the rule that sibling completions do not see each other, the scores move by far more than the tolerance above."""
    transformers.AutoModelForCausalLM.from_config(configs()["llama"]).save_pretrained(tmp_path)
    scorer = Scorer(
        load_language_model(tmp_path, dtype=torch.float32, attention="sdpa"), lambda a, b: (a.sum(), a.new_zeros(()), {}), ()
    )
    batch = batch_of(0)
    merged = batch.completion_ids.clamp(max=0)  # all completions count as one
    with torch.no_grad():
        assert float((scorer(batch)[2] - scorer(replace(batch, completion_ids=merged))[2]).abs().max()) > 1e-2


def test_no_mask_is_made_under_inference_mode() -> None:
    batch = batch_of(0)
    batch = batch.padded_to(padded_length(batch.num_tokens))
    with torch.inference_mode(), pytest.raises(AssertionError, match="inference_mode"):
        block_mask(batch)


def test_a_batch_has_whole_pairs_of_blocks() -> None:
    assert [padded_length(tokens) for tokens in (1, 128, 256, 257, 1025)] == [256, 256, 256, 512, 1280]


def test_the_choice() -> None:
    llama, gemma, gpt2 = configs()["llama"], configs()["gemma2"], transformers.GPT2Config(n_embd=64, n_head=4)
    narrow = transformers.LlamaConfig(**{**SHAPE, "hidden_size": 32})
    found = [choose_attention("auto", config, device="cuda:0") for config in (llama, gemma, gpt2, narrow)]
    assert found == [FLEX, FLEX, PER_PROMPT, PER_PROMPT]
    assert [choose_attention("auto", config, device="cpu") for config in (llama, gemma)] == [PER_PROMPT, "eager"]
    assert [choose_attention("per_prompt", config, device="cuda:0") for config in (llama, gpt2)] == [PER_PROMPT] * 2
    assert [choose_attention("sdpa", config, device="cuda:0") for config in (llama, gemma)] == ["sdpa", "eager"]
    with pytest.raises(UserError, match=r"model.attention=per_prompt .*soft-capped.*set model.attention=auto or sdpa"):
        choose_attention("per_prompt", gemma, device="cpu")
    for config, device, words in (
        (llama, "cpu", "needs a CUDA device"),
        (gpt2, "cuda:0", "GPT2LMHeadModel"),
        (narrow, "cuda:0", "heads of width 16 or more"),
    ):
        with pytest.raises(UserError, match=f"model.attention=flex .*{words}.*set model.attention=auto or sdpa"):
            choose_attention("flex", config, device=device)


def test_compilations_are_counted() -> None:
    before = num_compilations()
    double = torch.compile(lambda x: x * 2, backend="eager", dynamic=False)
    double(torch.ones(3))
    assert num_compilations() == before + 1
    double(torch.zeros(3))
    assert num_compilations() == before + 1
    double(torch.ones(4))
    assert num_compilations() == before + 2
