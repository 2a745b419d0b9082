"""Preference rows as prompts: each has one branch point at its end, with the row's completions. K may differ from row to row.

All text is tokenised once, when a task is built. It takes about 4 bytes of memory per token, and about 1 s for 10,000 rows of
200 tokens.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.dataset.schema import PreferenceRow
from rec_dist.data.prompts.plain_text import PlainText, beyond
from rec_dist.data.prompts.tokens import begin_tokens
from rec_dist.errors import UserError
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.sizes import Sizes
from rec_dist.runtime.arrays import I32, I64
from rec_dist.storage.files import fingerprint


@dataclass(frozen=True)
class TextRows:
    """Tokens of R rows with N completions.

    The prompt of row r is prompts[prompt_offsets[r] : prompt_offsets[r + 1]], and its completions are row_offsets[r] to
    row_offsets[r + 1]. Completion n is completions[completion_offsets[n] : completion_offsets[n + 1]], end tokens included.
    """

    prompts: I32
    prompt_offsets: I64  # (R+1,)
    completions: I32
    completion_offsets: I64  # (N+1,)
    row_offsets: I64  # (R+1,)

    def __len__(self) -> int:
        return len(self.row_offsets) - 1

    @property
    def num_rejected(self) -> I64:
        """(R,): the number of rejected completions of each row."""
        return np.diff(self.row_offsets) - 1

    @property
    def fingerprint(self) -> str:
        """Changes with any token of any row."""
        parts = (self.prompts, self.prompt_offsets, self.completions, self.completion_offsets, self.row_offsets)
        return fingerprint([fingerprint(part.tolist()) for part in parts])

    def sizes(self, rows: I64) -> Sizes:
        """Those of the prompts of rows (U,)."""
        prompts, completions = np.diff(self.prompt_offsets)[rows], np.diff(self.row_offsets)[rows]
        scored = np.diff(self.completion_offsets[self.row_offsets])[rows]
        return Sizes(
            num_tokens=prompts + scored - completions,  # the last token of a completion is never fed
            num_groups=np.ones_like(prompts),
            num_scored=scored,
            num_logical_tokens=prompts * completions + scored,
        )

    def grouped_prompt(self, row: int) -> GroupedPrompt:
        """The prompt and completions of one row. The key is the row number."""
        prompt = self.prompts[self.prompt_offsets[row] : self.prompt_offsets[row + 1]]
        bounds = self.completion_offsets[self.row_offsets[row] : self.row_offsets[row + 1] + 1]
        targets = self.completions[bounds[0] : bounds[-1]]
        fed = np.ones(len(targets), dtype=bool)
        fed[bounds[1:] - bounds[0] - 1] = False  # no row predicts from the last token of a completion
        lengths = np.diff(bounds).astype(np.int32)
        return GroupedPrompt(
            tokens=prompt,
            branch_points=np.asarray([len(prompt) - 1], dtype=np.int32),
            keys=np.asarray([row], dtype=np.int64),
            group_sizes=np.asarray([len(lengths)], dtype=np.int32),
            completion_inputs=targets[fed],
            input_lengths=lengths - 1,
            lengths=lengths,
            targets=targets,
        )


def tokenize_rows(
    batches: Iterable[Sequence[PreferenceRow]],
    tokenizer: Any,
    end: Sequence[int],
    *,
    rejected: bool,
    special_tokens: Literal["split", "parse"] = "split",
) -> TextRows:
    """Tokenises prompts, and completions as they read after the last character of their prompt. Appends `end` to each completion.

    rejected=False keeps only the chosen completions. special_tokens: what the text of one in a row is, text or that token
    (prompt.special_tokens). Raises UserError for a text that tokenises to nothing.
    """
    begin = begin_tokens(tokenizer)
    prompts: list[list[int]] = []
    answers: list[list[int]] = []
    sizes: list[int] = []
    heads: dict[str, list[int]] = {}

    plain = PlainText(tokenizer)

    def ids(texts: list[str]) -> list[list[int]]:
        if special_tokens == "split":
            return plain(texts)
        return [list(found) for found in tokenizer(texts, add_special_tokens=False).input_ids]

    for rows in batches:
        kept = [row.completions if rejected else row.completions[:1] for row in rows]
        before = [row.prompt[-1] for row, texts in zip(rows, kept, strict=True) for _ in texts]
        flat = [text for texts in kept for text in texts]
        for text in sorted(set(before) - set(heads)):
            heads[text] = ids([text])[0]
        joined, alone = ids([a + b for a, b in zip(before, flat, strict=True)]), ids(flat)
        for head, after, own, text in zip(before, joined, alone, flat, strict=True):
            behind = beyond(heads[head], after)
            piece = own if behind is None else behind
            if not piece:
                raise UserError(f"data.path: the completion {text!r} tokenises to nothing; leave its row out")
            answers.append([*piece, *end])
        prompts += [[*begin, *found] for found in ids([row.prompt for row in rows])]
        sizes += [len(texts) for texts in kept]
    plain.say("texts of preference rows", "; set prompt.special_tokens=parse if they are meant as tokens")
    if any(not prompt for prompt in prompts):
        raise UserError(
            f"data.path: the prompt of row {[bool(p) for p in prompts].index(False)} tokenises to nothing; leave it out"
        )
    return TextRows(
        *_flat(prompts),
        *_flat(answers),
        row_offsets=offsets_of(np.asarray(sizes, dtype=np.int64)),
    )


def _flat(lists: list[list[int]]) -> tuple[I32, I64]:
    offsets = offsets_of(np.asarray([len(values) for values in lists], dtype=np.int64))
    return np.fromiter((token for values in lists for token in values), dtype=np.int32, count=int(offsets[-1])), offsets
