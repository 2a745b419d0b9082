"""The prompt builder: a history and its completions as token arrays. Training, evaluation and serving use the same builder.

A prompt is `begin | (item_prefix title)* | tail`. Its last token is the branch point, where a completion (title + end) begins.
In style list, the tail is the item prefix itself, so a longer prompt has a branch point before every title. Several targets of
one user then share one prompt (a timeline) at no cost. If the history continues with a chosen item, the rows of the prompt
itself score it. The builder is saved beside the model as prompt.json.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from rec_dist.config.schema import PromptConfig
from rec_dist.data.dataset.ragged import sums
from rec_dist.data.prompts.tokens import TokenTable, begin_tokens, build_token_table, check_vocabulary, piece_tokens
from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import fingerprint, read_object, write_json

PROMPT_NAME = "prompt.json"
_HISTORY_MARK = "\x02HISTORY\x02"


@dataclass(frozen=True)
class PromptPieces:
    """The constant parts of prompts and completions as token ids."""

    begin: tuple[int, ...]
    item_prefix: tuple[int, ...]
    tail: tuple[int, ...]
    end: tuple[int, ...]
    candidates_header: tuple[int, ...]
    answer_header: tuple[int, ...]


class PromptBuilder:
    """Builds prompts from item ids. listed: how many candidates a prompt lists, 0 for none."""

    def __init__(self, pieces: PromptPieces, titles: TokenTable, *, max_history: int, listed: int) -> None:
        self.pieces = pieces
        self.titles = titles
        self.max_history = max_history
        self.listed = listed
        self._prefix = np.asarray(pieces.item_prefix, dtype=np.int32)
        self._end = np.asarray(pieces.end, dtype=np.int32)
        self._begin = np.asarray(pieces.begin, dtype=np.int32)
        self._tail = np.asarray(pieces.tail, dtype=np.int32)
        self._candidates_header = np.asarray(pieces.candidates_header, dtype=np.int32)
        self._answer_header = np.asarray(pieces.answer_header, dtype=np.int32)

    @property
    def fingerprint(self) -> str:
        """Changes whenever any prompt or completion would change."""
        titles = fingerprint([self.titles.tokens.tolist(), self.titles.offsets.tolist()])
        return fingerprint([vars(self.pieces), self.max_history, self.listed, titles])

    def completion(self, item: int) -> I32:
        """The title and end tokens of one item."""
        return np.concatenate([self.titles[item], self._end])

    def prompt(self, history: I32) -> I32:
        """The tokens (P,) of a prompt over `history` that lists no candidates."""
        return np.concatenate(
            [self._begin, *(part for item in history.tolist() for part in (self._prefix, self.titles[item])), self._tail]
        )

    def prompt_lengths(self, histories: I32, offsets: I64) -> I64:
        """(U,): the tokens of prompt() over each of U histories, those of u at offsets (U+1,)."""
        items = self.titles.lengths[histories] + len(self._prefix)
        return len(self._begin) + sums(items, offsets) + len(self._tail)

    def num_pooled(self, tokens: I32, pooling: str) -> int:
        """How many rows at the end of a prompt are pooled: 1 for `last`, or all behind the instruction for `mean`."""
        return 1 if pooling == "last" else len(tokens) - len(self._begin)

    def grouped_prompt(
        self,
        history: I32,
        completions: Sequence[I32],
        keys: Sequence[int],
        *,
        branch_at: Sequence[int] | None = None,
        listed: I32 | None = None,
    ) -> GroupedPrompt:
        """Builds one prompt over `history`, with one group of completions (item ids, the chosen one first) per branch point.

        branch_at: for each group, how many history items it sees; None means one group that sees all.
        listed: the candidates to write into the prompt, only if builder.listed is not 0.
        """
        parts: list[I32] = [self._begin]
        ends = np.zeros(len(history) + 1, dtype=np.int64)  # ends[h]: tokens before the tail that follows h items
        ends[0] = len(self._begin)
        for position, item in enumerate(history.tolist()):
            parts += (self._prefix, self.titles[item])
            ends[position + 1] = ends[position] + len(self._prefix) + len(parts[-1])
        if listed is not None:
            parts.append(self._candidates_header)
            for item in listed.tolist():
                parts += (self._prefix, self.titles[item])
            parts.append(self._answer_header)
            ends[-1] = sum(len(part) for part in parts)
        parts.append(self._tail)
        counts = [len(history)] if branch_at is None else list(branch_at)
        return self.branch_point(np.concatenate(parts), ends[counts] + len(self._tail) - 1, completions, keys)

    def branch_point(self, tokens: I32, branch_points: I64, completions: Sequence[I32], keys: Sequence[int]) -> GroupedPrompt:
        """Adds a group of completions (item ids, the chosen one first) to the prompt `tokens` (P,) at each branch point."""
        answers = [self.completion(item) for group in completions for item in group.tolist()]
        group_sizes = np.asarray([len(group) for group in completions], dtype=np.int32)
        branches = [answer[:-1] for answer in answers]
        for branch_point, chosen in zip(branch_points.tolist(), (np.cumsum(group_sizes) - group_sizes).tolist(), strict=True):
            if np.array_equal(tokens[branch_point + 1 : branch_point + 1 + len(branches[chosen])], branches[chosen]):
                branches[chosen] = branches[chosen][:0]  # the history continues with the chosen item, so the prompt has its rows
        return GroupedPrompt(
            tokens=tokens,
            branch_points=branch_points.astype(np.int32),
            keys=np.asarray(keys, dtype=np.int64),
            group_sizes=group_sizes,
            completion_inputs=np.concatenate(branches),
            input_lengths=np.asarray([len(branch) for branch in branches], dtype=np.int32),
            lengths=np.asarray([len(answer) for answer in answers], dtype=np.int32),
            targets=np.concatenate(answers),
        )

    def save(self, folder: Path) -> None:
        """Writes prompt.json with the pieces as ids, so that a server builds exactly the same prompts."""
        value = {**vars(self.pieces), "max_history": self.max_history, "listed": self.listed, "fingerprint": self.fingerprint}
        write_json(folder / PROMPT_NAME, value)


def check_saved(builder: PromptBuilder, folder: Path) -> None:
    """Raises UserError if the model in `folder` was trained with other prompts than `builder` makes."""
    saved = read_object(folder / PROMPT_NAME, TRAIN_AGAIN)
    own = json.loads(json.dumps({**vars(builder.pieces), "max_history": builder.max_history, "listed": builder.listed}))
    if changed := sorted(key for key, value in own.items() if saved.get(key) != value):
        raise UserError(
            f"the model in {folder} was trained with another prompt ({', '.join(changed)} differ); keep its prompt section"
        )


def build_prompt_builder(
    config: PromptConfig, tokenizer: Any, titles: Sequence[str], *, vocab_size: int | None = None
) -> PromptBuilder:
    """Tokenises the pieces of `config` and all titles. Raises UserError for pieces that do not fit this tokenizer.

    vocab_size: V, the rows of the model's embeddings, which every token must be below. Soft prompts need it: their ids are V to
    V + num_virtual - 1.
    """
    if config.special_tokens != "split":
        raise UserError(
            f"prompt.special_tokens={config.special_tokens} is for preference rows; titles of a catalogue are always plain text, so "
            "remove it"
        )
    if config.style == "chat":
        begin_text, tail_text = _chat_parts(config, tokenizer)
        begin = [int(t) for t in tokenizer(begin_text, add_special_tokens=False).input_ids]
        tail = piece_tokens(tokenizer, tail_text, after="\n")
    else:
        begin = begin_tokens(tokenizer) + [int(t) for t in tokenizer(config.instruction, add_special_tokens=False).input_ids]
        tail_text = config.item_prefix
        tail = piece_tokens(tokenizer, tail_text, after="a")
    of_text = tuple(begin)
    if config.num_virtual:
        assert vocab_size is not None
        # A BOS token stays first. Soft prompts come next, before all that depends on a user, so that servers can cache them.
        first = begin_tokens(tokenizer)
        place = len(first) if begin[: len(first)] == first else 0
        begin[place:place] = range(vocab_size, vocab_size + config.num_virtual)
    listed = config.candidates == "listed"
    answer_header = config.answer_header if listed and config.style == "list" else ""
    pieces = PromptPieces(
        begin=tuple(begin),
        item_prefix=tuple(piece_tokens(tokenizer, config.item_prefix, after="a")),
        tail=tuple(tail),
        end=tuple(end_tokens(config, tokenizer)),
        candidates_header=tuple(piece_tokens(tokenizer, config.candidates_header, after="a") if listed else ()),
        answer_header=tuple(piece_tokens(tokenizer, answer_header, after="a")),
    )
    if not pieces.tail:
        raise UserError(
            f"prompt.item_prefix ({config.item_prefix!r}) tokenises to nothing; set it to a visible text such as '\\n-'"
        )
    table = build_token_table(tokenizer, titles, after=config.item_prefix, max_tokens=config.max_title_tokens)
    if vocab_size is not None:
        headers = (*pieces.candidates_header, *pieces.answer_header)
        for ids in ((*of_text, *pieces.item_prefix, *pieces.tail, *pieces.end, *headers), table.tokens):
            check_vocabulary(tokenizer, ids, vocab_size)
    return PromptBuilder(pieces, table, max_history=config.max_history, listed=config.num_candidates if listed else 0)


def end_tokens(config: PromptConfig, tokenizer: Any) -> list[int]:
    """The tokens of prompt.end. Raises UserError if there are none."""
    if config.end == "<eos>":
        if tokenizer.eos_token_id is None:
            raise UserError("prompt.end is <eos> but this tokenizer has no end-of-sequence token; use a text such as '\\n'")
        return [int(tokenizer.eos_token_id)]
    end = piece_tokens(tokenizer, config.end, after="a")
    if not end:
        raise UserError(f"prompt.end ({config.end!r}) tokenises to nothing; use '\\n' or <eos>")
    return end


def _chat_parts(config: PromptConfig, tokenizer: Any) -> tuple[str, str]:
    if not getattr(tokenizer, "chat_template", None):
        raise UserError("prompt.style is chat but this tokenizer has no chat template; use prompt.style=list")
    content = f"{config.instruction}{_HISTORY_MARK}\n{config.question}"
    try:
        text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    except Exception as fault:  # a template is a program of the model's author
        raise UserError(f"prompt.style is chat and the chat template fails: {one_line(fault)}; use prompt.style=list") from fault
    if text.count(_HISTORY_MARK) != 1:
        raise UserError(
            "prompt.style is chat but the chat template does not contain the user's text exactly once; use prompt.style=list"
        )
    begin, tail = text.split(_HISTORY_MARK)
    return begin, tail
