"""FLOP of a step on numbers worked out by hand, and peaks by name."""

import numpy as np
import pytest
import torch
import transformers

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts.builder import PromptBuilder, PromptPieces
from rec_dist.data.prompts.title_trie import catalogue_packing
from rec_dist.data.prompts.tokens import TokenTable
from rec_dist.models.language import LoraSpec, add_lora
from rec_dist.models.scorer import Scorer
from rec_dist.models.size import WeightCount, count_weights
from rec_dist.models.soft_prompt import add_soft_prompt
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.training.flops import known_peak, recomputed_flops, row_flops, step_flops, token_flops, utilisation
from rec_dist.training.utilisation import head_share


def small_builder(titles: list[list[int]]) -> PromptBuilder:
    """Of titles as tokens; a title ends with 0."""
    table = TokenTable(
        np.asarray([token for title in titles for token in title], dtype=np.int32),
        offsets_of(np.asarray([len(title) for title in titles], dtype=np.int64)),
    )
    pieces = PromptPieces(begin=(9,), item_prefix=(8,), tail=(8,), end=(0,), candidates_header=(), answer_header=())
    return PromptBuilder(pieces, table, max_history=3, listed=0)


def test_lora_is_4n_and_full_fine_tuning_6n() -> None:
    assert token_flops(frozen=8_000_000_000, training=0) == 32_000_000_000
    assert token_flops(frozen=0, training=8_000_000_000) == 48_000_000_000
    assert token_flops(frozen=100, training=10) == 460


def test_the_head_costs_scored_rows_alone() -> None:
    assert row_flops(head=1000, trains=False) == 4000
    assert row_flops(head=1000, trains=True) == 6000
    assert step_flops(7, 3, frozen=100, training=10, head=1000, head_trains=False) == 7 * 460 + 3 * 4000
    assert step_flops(7, 0, frozen=0, training=10, head=1000, head_trains=True) == 420


def test_the_head_multiplies_what_a_token_competes_with() -> None:
    """Titles 1 2 0 and 1 3 0, none of which is in the prompt: the first token has one word to choose from, the second two."""
    builder = small_builder([[1, 2], [1, 3]])
    prompt = builder.grouped_prompt(np.empty(0, dtype=np.int32), [np.asarray([0, 1], dtype=np.int32)], [0])
    batch = catalogue_packing(builder, 1.0)([prompt])
    plan = batch.allowed
    assert plan is not None
    logits = sum(len(plan.rows[c.choices]) * len(plan.words[c.words]) for c in plan.chunks)
    assert head_share([batch], 100) == logits / (100 * len(plan.rows))
    assert head_share([batch, batch], 100) == head_share([batch], 100) < 0.05
    assert head_share([pack_prompts([prompt])], 100) == head_share([], 100) == 1.0


def test_recomputation_is_2n_and_the_logits() -> None:
    assert recomputed_flops(7, 3, frozen=100, training=10, head=1000, checkpointing=True) == 7 * 220 + 3 * 2000
    assert recomputed_flops(7, 3, frozen=100, training=10, head=1000, checkpointing=False) == 3 * 2000


def test_utilisation() -> None:
    """LoRA on 8 billion weights at 12,000 tokens/s on one H100: 384 of 989 TFLOP/s."""
    done = step_flops(12_000, 0, frozen=8_000_000_000, training=0, head=0, head_trains=False)
    assert utilisation(done, 1.0, 989e12, 1) == pytest.approx(0.38827, abs=1e-5)
    assert utilisation(done, 2.0, 989e12, 4) == pytest.approx(0.38827 / 8, abs=1e-5)


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H100 NVL", 835e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA H200 NVL", 835e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA B200", 2.25e15),
        ("NVIDIA GB200", 2.5e15),
    ],
)
def test_peaks_by_name(name: str, peak: float) -> None:
    known = known_peak(name)
    assert known is not None and known[0] == peak and "data sheet" in known[1]


def test_an_unknown_device_has_no_peak() -> None:
    assert known_peak("NVIDIA GeForce RTX 4090") is None


SHAPE = {"vocab_size": 50, "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4}
LAYER = 4 * 16 * 16 + 3 * 16 * 24  # q, k, v, o and three of the MLP


def scorer_of(model: torch.nn.Module) -> Scorer:
    return Scorer(model, lambda logps, batch: (logps.sum(), logps.new_zeros(()), {}), ())


@pytest.mark.parametrize("tied", [True, False])
def test_the_count_of_full_fine_tuning(tied: bool) -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=tied, attention_bias=True))
    assert count_weights(scorer_of(model)) == WeightCount(0, 2 * LAYER, 800, True)


def test_the_count_with_an_adapter_and_the_frozen_copy_of_another() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True))
    spec = LoraSpec(rank=2, alpha=4.0, dropout=0.0, target_modules=["q_proj", "down_proj"])
    wrapped = add_lora(model, spec, seed=0, weights=None, keep_reference=False)
    expected = WeightCount(2 * LAYER, 2 * 2 * ((16 + 16) + (24 + 16)), 800, False)
    assert count_weights(scorer_of(wrapped)) == expected
    wrapped.add_adapter("reference", wrapped.peft_config["default"])  # type: ignore[operator,union-attr,index]
    assert count_weights(scorer_of(wrapped)) == expected


def test_soft_prompts_are_looked_up_not_multiplied() -> None:
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=False))
    embedding = add_soft_prompt(model, torch.zeros(3, 16))
    model.requires_grad_(False)
    embedding.prompt.requires_grad_(True)
    assert count_weights(scorer_of(model)) == WeightCount(2 * LAYER, 0, 800, False)


def test_position_embeddings_are_no_work() -> None:
    model = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_positions=32, n_embd=16, n_layer=2, n_head=4))
    assert count_weights(scorer_of(model)) == WeightCount(0, 2 * 12 * 16 * 16, 800, True)


def test_experts_and_foreign_modules_are_not_counted() -> None:
    config = transformers.MixtralConfig(**SHAPE, num_key_value_heads=4, num_local_experts=2, num_experts_per_tok=1)
    assert count_weights(scorer_of(transformers.MixtralForCausalLM(config))) is None
    assert count_weights(torch.nn.Linear(2, 2)) is None
