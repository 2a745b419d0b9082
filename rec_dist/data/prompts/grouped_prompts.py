"""Sizes of many prompts, and many prompts built at once: what PromptBuilder.grouped_prompt builds one by one, from one gather.

A rank needs the sizes of all examples of a step, since they decide the packing, and builds only its own. Sizes take about
1 us an example. Built one by one, an example with 16 completions takes 180 us, mostly for calls on arrays of 5 tokens; here
20 us at any history length. Both ways give equal arrays (tests/unit/test_grouped_prompts.py).

U examples, G groups, N completions, H history items, S segments, I items of the catalogue, L candidates that a prompt lists.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np

from rec_dist.data.dataset.ragged import offsets_of, runs, sums
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.prompts.groups import Groups
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.sizes import Sizes
from rec_dist.runtime.arrays import F32, I32, I64


@dataclass(frozen=True)
class Segments:
    """Pieces of a flat token table: piece s is table[starts[s] : starts[s] + lengths[s]]."""

    table: I32
    starts: I64
    lengths: I64

    def gather(self, chosen: I64) -> tuple[I32, I64]:
        """Joins the pieces chosen (S,): returns (tokens (sum,), offsets (S+1,))."""
        lengths = self.lengths[chosen]
        return self.table[runs(self.starts[chosen], lengths)], offsets_of(lengths)


@dataclass(frozen=True)
class _Layout:
    """Where everything lies in U prompts, one after another, before there are tokens."""

    pieces: I64  # (S,) the prompts' pieces
    prompt_offsets: I64  # (U+1,)
    owner: I64  # (G,) the example of each group
    branch_points: I64  # (G,) within their prompts

    @property
    def branch_point_rows(self) -> I64:
        """(G,): the same in the flat run of all prompts."""
        return self.prompt_offsets[self.owner] + self.branch_points

    @property
    def room(self) -> I64:
        """(G,): prompt tokens behind each branch point."""
        return self.prompt_offsets[self.owner + 1] - 1 - self.branch_point_rows


class GroupedPromptFactory:
    """Sizes and prompts of `Groups`. Holds a second copy of each title: 4 bytes per token."""

    def __init__(self, builder: PromptBuilder) -> None:
        pieces, titles = builder.pieces, builder.titles
        prefix, end = len(pieces.item_prefix), len(pieces.end)
        lengths = titles.lengths  # (I,)
        # One table serves both uses: it holds item i as prefix, title, end. Prompts take the first two, answers the last two.
        framed = np.empty(len(titles.tokens) + len(lengths) * (prefix + end), dtype=np.int32)
        starts = titles.offsets[:-1] + np.arange(len(lengths)) * (prefix + end)
        for place, token in enumerate(pieces.item_prefix):
            framed[starts + place] = token
        framed[runs(starts + prefix, lengths)] = titles.tokens
        for place, token in enumerate(pieces.end):
            framed[starts + prefix + lengths + place] = token
        constants = (pieces.begin, pieces.candidates_header, pieces.answer_header, pieces.tail)
        self._begin, self._list, self._answer, self._tail = len(lengths) + np.arange(4)  # the piece numbers of the constants
        sizes = np.asarray([len(constant) for constant in constants])
        self._tail_length = len(pieces.tail)
        self._prompts = Segments(
            np.concatenate([framed, *(np.asarray(constant, dtype=np.int32) for constant in constants)]),
            np.concatenate([starts, len(framed) + offsets_of(sizes)[:-1]]),
            np.concatenate([lengths + prefix, sizes]),
        )
        self._answers = Segments(framed, starts + prefix, lengths + end)

    def sizes(self, groups: Groups) -> Sizes:
        """Those of the prompts that build() would build."""
        layout = self._layout(groups)
        lengths = self._answers.lengths[groups.completions]  # (G, 1 + K)
        branches = lengths - 1
        if len(layout.owner) >= len(layout.prompt_offsets):  # a prompt with several groups continues behind all but the last
            tokens, _ = self._prompts.gather(layout.pieces)
            answers, offsets = self._answers.gather(groups.completions[:, 0].astype(np.int64))
            branches[_along(tokens, layout, answers, offsets[:-1], branches[:, 0]), 0] = 0
        scored = sums(lengths.sum(axis=1), groups.group_offsets)
        prompts = sums((layout.branch_points + 1) * groups.completions.shape[1], groups.group_offsets)
        return Sizes(
            num_tokens=np.diff(layout.prompt_offsets) + sums(branches.sum(axis=1), groups.group_offsets),
            num_groups=np.diff(groups.group_offsets),
            num_scored=scored,
            num_logical_tokens=prompts + scored,
        )

    def build(self, groups: Groups) -> list[GroupedPrompt]:
        """Builds one prompt per example."""
        num_groups, size = groups.completions.shape
        layout, group_offsets = self._layout(groups), groups.group_offsets
        tokens, _ = self._prompts.gather(layout.pieces)
        targets, answer_offsets = self._answers.gather(groups.completions.reshape(-1).astype(np.int64))
        lengths = np.diff(answer_offsets)  # (N,)
        branches = lengths - 1
        chosen = np.arange(num_groups) * size
        along = _along(tokens, layout, targets, answer_offsets[chosen], branches[chosen])
        branches[chosen[along]] = 0  # the history continues with the chosen item, so the prompt has its rows
        completion_inputs = targets[runs(answer_offsets[:-1], branches)]
        ends = offsets_of(branches)
        columns = (layout.branch_points.astype(np.int32), branches.astype(np.int32), lengths.astype(np.int32))
        sizes = np.full(num_groups, size, dtype=np.int32)
        cuts = [layout.prompt_offsets, group_offsets, ends[group_offsets * size], answer_offsets[group_offsets * size]]
        return _cut(tokens, columns, groups.keys, sizes, completion_inputs, targets, size, cuts)

    def _layout(self, groups: Groups) -> _Layout:
        """Pieces of a prompt: begin | items | tail, or begin | items | header | candidates | header | tail."""
        counts, listed = np.diff(groups.history_offsets), groups.listed.shape[1]
        more = 2 + (listed + 2 if listed else 0)
        piece_offsets = groups.history_offsets + more * np.arange(len(groups.history_offsets))
        pieces = np.empty(piece_offsets[-1], dtype=np.int64)
        first, last = piece_offsets[:-1], piece_offsets[1:] - 1
        pieces[first] = self._begin
        pieces[last] = self._tail
        pieces[runs(first + 1, counts)] = groups.history
        if listed:
            pieces[last - listed - 2] = self._list
            pieces[(last - listed - 1)[:, None] + np.arange(listed)] = groups.listed
            pieces[last - 1] = self._answer
        before = offsets_of(self._prompts.lengths[pieces])  # (S+1,) tokens before each piece
        owner = np.repeat(np.arange(len(counts)), np.diff(groups.group_offsets))
        seen = before[
            last[owner] if listed else first[owner] + 1 + groups.branch_at
        ]  # (G,) tokens that a group sees before a tail
        prompt_offsets = before[piece_offsets]
        return _Layout(pieces, prompt_offsets, owner, seen - prompt_offsets[owner] + self._tail_length - 1)


@dataclass(frozen=True)
class DrawnPrompts:
    """Implements methods.task.DrawnExamples. margins: of groups, (G, 1 + K), for losses that need them."""

    factory: GroupedPromptFactory
    groups: Groups
    margins: Callable[[Groups], F32] | None = None

    @property
    def sizes(self) -> Sizes:
        """Those of all prompts."""
        return self.factory.sizes(self.groups)

    def build(self, chosen: Sequence[int]) -> list[GroupedPrompt]:
        """Build the prompts at these places."""
        groups = self.groups.of(np.asarray(chosen, dtype=np.int64))
        prompts = self.factory.build(groups)
        if self.margins is None:
            return prompts
        margins, bounds = self.margins(groups), groups.group_offsets.tolist()
        return [
            replace(prompt, margins=margins[a:b].reshape(-1)) for prompt, (a, b) in zip(prompts, pairwise(bounds), strict=True)
        ]


def _along(tokens: I32, layout: _Layout, answers: I32, starts: I64, lengths: I64) -> I64:
    """The groups whose prompt continues with the chosen answer, less its last token: answers[starts (G,):][: lengths (G,)]."""
    fits = np.flatnonzero(lengths <= layout.room)
    places, lengths = layout.branch_point_rows[fits] + 1, lengths[fits]
    differs = tokens[runs(places, lengths)] != answers[runs(starts[fits], lengths)]
    owner = np.repeat(np.arange(len(fits)), lengths)
    result: I64 = fits[np.bincount(owner[differs], minlength=len(fits)) == 0]
    return result


def _cut(
    tokens: I32,
    columns: tuple[I32, I32, I32],
    keys: I64,
    sizes: I32,
    completion_inputs: I32,
    targets: I32,
    size: int,
    cuts: list[I64],
) -> list[GroupedPrompt]:
    """Cuts the flat arrays into views, one prompt per example.

    cuts (U+1,): where examples begin in tokens, groups, completion tokens and targets.
    """
    branch_points, branches, lengths = columns
    bounds = list(zip(*(cut.tolist() for cut in cuts), strict=True))
    return [
        GroupedPrompt(
            tokens=tokens[token:next_token],
            branch_points=branch_points[group:next_group],
            keys=keys[group:next_group],
            group_sizes=sizes[group:next_group],
            completion_inputs=completion_inputs[branch:next_completion],
            input_lengths=branches[group * size : next_group * size],
            lengths=lengths[group * size : next_group * size],
            targets=targets[target:next_target],
        )
        for (token, group, branch, target), (next_token, next_group, next_completion, next_target) in pairwise(bounds)
    ]
