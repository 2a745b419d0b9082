"""A plain model for servers that take text and nothing else: the adapter merged, each soft prompt vector a new row of the vocabulary.

The head keeps its own rows (tied embeddings are untied: V * D more weights), so that a vector fed is not a token predicted. Rows that
the head must gain are zero: their logits are 0, beside which those of a trained model's likely tokens are large, but not infinite.
Where a log-prob must be exact they are left out: `suppress_tokens` in generation_config.json names them. A model whose table is longer
than its tokenizer needs (Qwen2.5: 271 rows) gains none, and is exact without.

V vocabulary, D width, n vectors.
"""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError


def token_names(num: int) -> list[str]:
    """What stands for the vectors in a text, one after another and without spaces."""
    return [f"<|soft_{number}|>" for number in range(num)]


def write_merged_model(base: Path, adapter: Path | None, vectors: Tensor | None, folder: Path) -> list[int]:
    """Writes model and tokenizer into `folder`, in the dtype of `base`; returns the vectors' token ids (n,), empty without any.

    adapter: a PEFT folder, merged into the weights; vectors (n, D). Holds the whole model in memory, once.
    """
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(str(base), dtype="auto")
    tokenizer: Any = AutoTokenizer.from_pretrained(str(base))
    if adapter is not None:
        model = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    ids: list[int] = []
    if vectors is not None:
        names = token_names(len(vectors))
        if known := set(names) & set(tokenizer.get_vocab()):
            raise UserError(f"the tokenizer in {base} already has {sorted(known)[0]}; it holds soft prompts of another export")
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
    if head.bias is not None:  # here a new row can be made impossible
        bias = head.bias.new_full((size,), torch.finfo(head.bias.dtype).min)
        bias[: len(head.bias)] = head.bias
        head.bias = nn.Parameter(bias)
    model.config.tie_word_embeddings = False
    model.config.get_text_config().vocab_size = size
    if size > len(table):
        model.generation_config.suppress_tokens = [token for token in ids if token >= len(table)]
