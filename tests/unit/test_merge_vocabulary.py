"""Soft prompts as vocabulary rows: a plain model, loaded from disk, gives the logits that the vectors gave, for every head."""

from pathlib import Path
from typing import Any

import pytest
import torch

from rec_dist.models.merge import token_names, write_merged_model

NUM = 5


def model_dir(folder: Path, tokenizer: Any, *, rows: int, tied: bool, family: str) -> Path:
    from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    if family == "gpt2":
        size = {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}
        model: Any = GPT2LMHeadModel(GPT2Config(vocab_size=rows, bos_token_id=0, eos_token_id=0, **size))
    else:
        size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
        model = LlamaForCausalLM(
            LlamaConfig(vocab_size=rows, tie_word_embeddings=tied, bos_token_id=None, eos_token_id=0, **size)
        )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("rows", "tied", "family"),
    [(320, True, "llama"), (320, False, "llama"), (352, True, "llama"), (322, True, "llama"), (320, True, "gpt2")],
)
def test_a_plain_model_gives_the_same_logits(rows, tied, family, tiny_tokenizer, tmp_path):
    """rows: 320 is what the tokenizer needs; 352 leaves room for all vectors, 322 for some."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = model_dir(tmp_path / "base", tiny_tokenizer, rows=rows, tied=tied, family=family)
    vectors = torch.randn(NUM, 32, generator=torch.Generator().manual_seed(1))
    ids = write_merged_model(base, None, vectors, tmp_path / "merged")
    tokenizer = AutoTokenizer.from_pretrained(str(tmp_path / "merged"))
    text = "A user watched:\n- Silent River\n-"
    tokens = tokenizer("".join(token_names(NUM)) + text).input_ids
    assert tokens == ids + tiny_tokenizer(text).input_ids
    plain = AutoModelForCausalLM.from_pretrained(str(base), dtype=torch.float32).eval()
    merged, loading = AutoModelForCausalLM.from_pretrained(str(tmp_path / "merged"), output_loading_info=True)
    assert not loading["missing_keys"]
    with torch.no_grad():
        rest = plain.get_input_embeddings()(torch.tensor([tokens[NUM:]]))
        expected = plain(inputs_embeds=torch.cat([vectors[None], rest], dim=1)).logits
        found = merged.eval()(input_ids=torch.tensor([tokens])).logits
    torch.testing.assert_close(found[..., :rows], expected, rtol=1e-5, atol=1e-5)
    gained = list(range(rows, 320 + NUM))
    assert (merged.generation_config.suppress_tokens or []) == gained
    if not gained:  # exact without leaving anything out
        torch.testing.assert_close(found.log_softmax(-1), expected.log_softmax(-1), rtol=1e-5, atol=1e-5)
    assert not float(found[..., gained].abs().sum())
