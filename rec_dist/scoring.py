"""`rec_dist.score`: log-probs of completions after prompts, under any causal language model that you have loaded.

Each prompt runs once for all its completions. Cost for P prompt tokens and N completions of C tokens: P + N (C - 1) rows of the
model, against N (P + C) one by one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn

from rec_dist.data.prompts.given_texts import Text, check_tokenizer, token_ids
from rec_dist.data.prompts.plain_text import PlainText
from rec_dist.data.sampling.global_batches import pack_evenly
from rec_dist.errors import UserError, one_line
from rec_dist.models.attention_paths import base_of
from rec_dist.models.borrowed import check_borrowed, evaluating, input_device, packed_logps, taking_packed_batches
from rec_dist.models.probe import check_same, probe_tokens
from rec_dist.models.shape import position_limit
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.runtime.arrays import I32

_checked: WeakSet[nn.Module] = WeakSet()  # models that have passed _check_against_plain; the check takes two short forward passes


def score(
    model: Any,
    tokenizer: Any,
    prompts: Sequence[Text],
    completions: Sequence[Sequence[Text]],
    *,
    max_tokens: int = 8192,
    attention: str = "auto",
    special_tokens: str = "split",
) -> list[Tensor]:
    """Log-probability of each completion after its prompt, summed over the completion's tokens, in nats.

        >>> logps = rec_dist.score(model, tokenizer, ["The capital of France is"], [[" Paris", " Rome"]])  # doctest: +SKIP
        >>> logps[0].argmax()  # doctest: +SKIP
        tensor(0)

    Equal to running plain transformers on each prompt + completion alone, to rounding. Nothing is added behind a completion.

    Args:
        model: a loaded causal LM of transformers, with or without a PEFT adapter, on any device. It runs in evaluation mode and
            without gradients, and is afterwards exactly as it was. Do not use it in another thread meanwhile.
        tokenizer: its tokenizer; None if everything is token ids.
        prompts: U strings, or sequences of token ids. A string becomes `tokenizer(prompt)`, BOS included.
        completions: for each prompt a list of strings or of token ids; the list may be empty. A string is tokenized with
            `add_special_tokens=False`.
        max_tokens: rows of one forward pass, which bounds memory. At least the longest prompt with one completion.
        special_tokens: split: the text of a special token inside a string, such as `</s>`, is text like all other, and a warning
            counts the strings that hold one. parse: it is that token, for prompts that are written with chat markup.
        attention: auto, flex, per_prompt or sdpa, as the key model.attention.

    Returns:
        U tensors, in the order of prompts: float32 on the CPU, of shape (len(completions[i]),).

    Raises:
        UserError (a ValueError): a prompt or a completion without tokens, an id that the model does not have, a sequence
            longer than max_tokens or than the model's positions, or a model that cannot share prompts (ALiBi, Mamba,
            encoder-decoders).
    """
    check_borrowed(model)
    base = base_of(model)
    _check_settings(max_tokens, attention, special_tokens)
    shared = _read(tokenizer, prompts, completions, special_tokens, num_ids=int(base.get_input_embeddings().weight.shape[0]))
    _check_lengths(shared, max_tokens, position_limit(base.config.to_dict()))
    pieces = [piece for prompt in shared for piece in _cut(prompt, max_tokens)]
    results = [np.zeros(len(prompt.completions), dtype=np.float32) for prompt in shared]
    if not pieces:
        return [torch.from_numpy(sums) for sums in results]
    lengths = np.asarray([piece.num_tokens for piece in pieces], dtype=np.int64)
    micro_batches = pack_evenly(lengths, max_tokens, 1)
    with evaluating(model):
        _check_against_plain(model, attention)
        with taking_packed_batches(model, attention):
            for numbers in micro_batches:
                logps = packed_logps(model, pack_prompts([pieces[number].grouped() for number in numbers]))
                sizes = [len(pieces[number].completions) for number in numbers]
                for number, part in zip(numbers, torch.split(logps, sizes), strict=True):
                    piece = pieces[number]
                    results[piece.index][piece.first : piece.first + len(part)] = part.numpy()
    return [torch.from_numpy(sums) for sums in results]


def _check_settings(max_tokens: object, attention: str, special_tokens: str) -> None:
    if not isinstance(max_tokens, int | np.integer):
        raise UserError(f"max_tokens ({max_tokens!r}) must be a whole number")
    if attention not in ("auto", "flex", "per_prompt", "sdpa"):
        raise UserError(f"attention ({attention!r}) must be auto, flex, per_prompt or sdpa")
    if special_tokens not in ("split", "parse"):
        raise UserError(f"special_tokens ({special_tokens!r}) must be split or parse")


@dataclass(frozen=True)
class _Prompt:
    """Prompt `index` with its completions from number `first` on, as token ids."""

    index: int
    tokens: I32
    completions: list[I32]
    first: int = 0

    @property
    def num_tokens(self) -> int:
        """Rows in a batch: the last token of a completion is predicted but never read."""
        return len(self.tokens) + sum(len(completion) - 1 for completion in self.completions)

    def grouped(self) -> GroupedPrompt:
        """One group, which branches off at the end of the prompt."""
        lengths = np.asarray([len(completion) for completion in self.completions], dtype=np.int32)
        return GroupedPrompt(
            tokens=self.tokens,
            branch_points=np.asarray([len(self.tokens) - 1], dtype=np.int32),
            keys=np.asarray([self.index], dtype=np.int64),
            group_sizes=np.asarray([len(lengths)], dtype=np.int32),
            completion_inputs=np.concatenate([completion[:-1] for completion in self.completions]),
            input_lengths=lengths - 1,
            lengths=lengths,
            targets=np.concatenate(self.completions),
        )


def _read(
    tokenizer: Any, prompts: Sequence[Text], completions: Sequence[Sequence[Text]], special_tokens: str, *, num_ids: int
) -> list[_Prompt]:
    """The inputs as token ids. Raises UserError if they do not fit together, or are empty or out of range."""
    for name, value in (("prompts", prompts), ("completions", completions)):
        if isinstance(value, str) or not isinstance(value, Sequence):
            raise UserError(f"{name} ({type(value).__name__}) must be a list with one entry a prompt")
    if len(prompts) != len(completions):
        raise UserError(
            f"prompts has {len(prompts)} entries and completions has {len(completions)}; give one list for each prompt"
        )
    for index, listed in enumerate(completions):
        if isinstance(listed, str) or not isinstance(listed, Sequence):
            raise UserError(f"completions[{index}] ({type(listed).__name__}) must be a list of completions")
    check_tokenizer(tokenizer, [*prompts, *(text for listed in completions for text in listed)])
    plain = PlainText(tokenizer) if special_tokens == "split" else None
    heads = token_ids(
        prompts,
        lambda words: tokenizer(words)["input_ids"] if plain is None else plain.with_template(words),
        num_ids,
        lambda index: f"prompts[{index}]",
    )
    places = [(index, place) for index, listed in enumerate(completions) for place in range(len(listed))]
    tails = token_ids(
        [completions[index][place] for index, place in places],
        lambda words: tokenizer(words, add_special_tokens=False)["input_ids"] if plain is None else plain(words),
        num_ids,
        lambda number: "completions[{}][{}]".format(*places[number]),
    )
    if plain is not None:
        plain.say("prompts and completions", "; call score with special_tokens='parse' if they are meant as tokens")
    ends = np.cumsum([len(listed) for listed in completions]).tolist()
    return [
        _Prompt(index, head, tails[end - len(completions[index]) : end])
        for index, (head, end) in enumerate(zip(heads, ends, strict=True))
    ]


def _check_lengths(prompts: list[_Prompt], max_tokens: int, max_positions: int | None) -> None:
    for prompt in prompts:
        for place, completion in enumerate(prompt.completions):
            name = f"prompts[{prompt.index}] with completions[{prompt.index}][{place}]"
            rows = len(prompt.tokens) + len(completion) - 1
            if max_positions is not None and rows > max_positions:
                raise UserError(f"{name} takes {rows} positions and the model has {max_positions}; shorten the prompt")
            if rows > max_tokens:
                raise UserError(
                    f"max_tokens ({max_tokens}) is smaller than {name} ({rows} tokens); raise it, or shorten the prompt"
                )


def _cut(prompt: _Prompt, max_tokens: int) -> list[_Prompt]:
    """The prompt with runs of its completions that fit into one forward pass."""
    pieces: list[_Prompt] = []
    begin, used = 0, len(prompt.tokens)
    for place, completion in enumerate(prompt.completions):
        if used + len(completion) - 1 > max_tokens:
            pieces.append(_Prompt(prompt.index, prompt.tokens, prompt.completions[begin:place], begin))
            begin, used = place, len(prompt.tokens)
        used += len(completion) - 1
    rest = prompt.completions[begin:]
    return [*pieces, _Prompt(prompt.index, prompt.tokens, rest, begin)] if rest else pieces


def _check_against_plain(model: Any, attention: str) -> None:
    """Raises UserError if a packed batch does not give what the model itself gives; once a model."""
    if model in _checked:
        return
    base = base_of(model)
    tokens = probe_tokens(int(base.get_input_embeddings().weight.shape[0]))
    probe = [_Prompt(0, tokens[40:46], [tokens[50:53]]), _Prompt(1, tokens[:9], [tokens[20:24], tokens[30:35]])]
    plain = torch.stack([_plain_logp(model, one.tokens, answer) for one in probe for answer in one.completions])
    with taking_packed_batches(model, attention):
        try:
            packed = packed_logps(model, pack_prompts([one.grouped() for one in probe]))
        except torch.OutOfMemoryError:
            raise
        except Exception as fault:  # models fail in many ways at a mask that they do not know
            raise UserError(
                f"model is a {type(base).__name__}, which runs alone but not with a shared prompt "
                f"({type(fault).__name__}: {one_line(fault, 200)}); "
                "choose a decoder such as Llama, Qwen, Gemma or GPT-2"
            ) from fault
    check_same(packed, plain, base.dtype, what="this model's log-probs change", when="completions share a prompt", key="model")
    _checked.add(model)


def _plain_logp(model: Any, prompt: I32, answer: I32) -> Tensor:
    """() float32 on the CPU: the model's own forward pass over one sequence."""
    ids = torch.from_numpy(np.concatenate([prompt, answer]).astype(np.int64))
    logits = model(input_ids=ids[None].to(input_device(model)), use_cache=False).logits[0].float().cpu()
    places = torch.arange(len(prompt) - 1, len(ids) - 1)
    return torch.log_softmax(logits[places], -1)[torch.arange(len(answer)), ids[len(prompt) :]].sum()
