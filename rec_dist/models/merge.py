"""Writes a plain model for servers: the adapter is merged, and each soft prompt vector becomes a token of the vocabulary.

The head keeps its own rows (tied embeddings are untied, which adds V * D weights), so that a soft prompt token is never
predicted in place of another. If the head needs new rows, they are zero: their logits are 0, far below those of a trained
model's likely tokens, but not minus infinity. generation_config.json lists them in `suppress_tokens`; exclude them if a
log-prob must be exact. A model whose table is longer than its tokenizer needs (Qwen2.5: 271 rows) gets no new rows and is
exact.

V vocabulary, D width, n vectors.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError, one_line
from rec_dist.models.foreign_code import check_no_kernel, way_out
from rec_dist.models.language import ADAPTER_WEIGHTS


def token_names(num: int) -> list[str]:
    """The tokens that represent the vectors in a text, in order and without spaces between them."""
    return [f"<|soft_{number}|>" for number in range(num)]


def write_merged_model(
    base: Path, adapter: Path | None, vectors: Tensor | None, folder: Path, *, trust_remote_code: bool = False
) -> list[int]:
    """Writes model and tokenizer into `folder`, in the dtype of `base`. Returns the token ids of the n vectors; [] without
    vectors.

    adapter: a PEFT folder with safetensors to merge into the weights. vectors: (n, D). trust_remote_code:
    model.trust_remote_code. Needs memory for the whole model, once.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    check_no_kernel(base, trusted=trust_remote_code)
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            str(base), dtype="auto", trust_remote_code=trust_remote_code, use_safetensors=True
        )
        tokenizer: Any = AutoTokenizer.from_pretrained(str(base), trust_remote_code=trust_remote_code)
    except (OSError, ValueError, ImportError) as fault:
        raise UserError(f"{base} holds no model that loads: {one_line(fault)}{way_out(fault)}") from fault
    if adapter is not None:
        assert (adapter / ADAPTER_WEIGHTS).is_file(), adapter  # without it PEFT would unpickle adapter_model.bin
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ids: list[int] = []
    if vectors is not None:
        names = token_names(len(vectors))
        if known := set(names) & set(tokenizer.get_vocab()):
            raise UserError(
                f"the tokenizer in {base} already has {sorted(known)[0]}; it already holds the soft prompts of another export"
            )
        tokenizer.add_tokens(names, special_tokens=True)
        ids = [int(token) for token in tokenizer.convert_tokens_to_ids(names)]
        _add_rows(model, ids, vectors)
    model.save_pretrained(str(folder))
    tokenizer.save_pretrained(str(folder))
    return ids


@torch.no_grad()
def _add_rows(model: Any, ids: list[int], vectors: Tensor) -> None:
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    table, old_head = embedding.weight.detach(), head.weight.detach().clone()
    size = max(len(table), max(ids) + 1)
    grown = table.new_zeros(size, table.shape[1])
    grown[: len(table)] = table
    grown[ids] = vectors.to(grown)
    rows = old_head.new_zeros(size, old_head.shape[1])
    rows[: len(old_head)] = old_head
    embedding.weight, embedding.num_embeddings = nn.Parameter(grown), size
    head.weight, head.out_features = nn.Parameter(rows), size
    if head.bias is not None:  # a bias can make a new token impossible
        bias = head.bias.new_full((size,), torch.finfo(head.bias.dtype).min)
        bias[: len(head.bias)] = head.bias
        head.bias = nn.Parameter(bias)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().vocab_size = size
    if size > len(table):
        model.generation_config.suppress_tokens = [token for token in ids if token >= len(table)]
