"""The prompts of DELRec's two objectives at one training position. They show no item from that position on.

At position p of a user the teacher has read items 0 .. p - 1 and listed t_1 .. t_h. Each prompt begins with the soft prompt.

  Temporal Analysis: items .. p - 2, then an example and the question, of the form "watched next: X; the movie right before it:".
    The example shows items (p - 2, p - 3). The question shows t_1 as the next item, and the answer is item p - 1. Needs p >= 3.
  Recommendation Pattern Simulating: items .. p - 1, then t_2 .. t_h; the answer is t_1. The other candidates are t_2 .. t_h
    and random items.

Random items are a function of (seed, objective, epoch, user, position), and are neither in the history nor in the teacher's list.

m candidates, h items of a list, n soft prompt vectors, V vocabulary.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from rec_dist.data.dataset.ragged import offsets_of, runs
from rec_dist.data.prompts.builder import PromptBuilder
from rec_dist.data.sampling.many_draws import SeenItems, with_more
from rec_dist.data.sampling.negatives import NegativeSampler
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.sizes import Sizes
from rec_dist.runtime.arrays import I32, I64
from rec_dist.runtime.rng import hash_u64

TEMPORAL, PATTERN = 0, 1
FIRST_POSITION = 3  # a history and an example need three items
_ORDER = 33  # the stream of random draws of this module
_NOTHING = np.empty(0, dtype=np.int32)


@dataclass(frozen=True)
class Place:
    """Position p of a user whose earlier items are `before` (p,). listed (h,): the teacher's list at p. key: of the example."""

    user: int
    position: int
    epoch: int
    before: I32
    listed: I32
    key: int


@dataclass(frozen=True)
class Places:
    """U of them: users, epochs (U,), listed (U, h), and the earlier items of each at before_offsets (U+1,) of `before`."""

    users: I64
    epochs: I64
    before: I32
    before_offsets: I64
    listed: I32

    @property
    def positions(self) -> I64:
        """(U,)."""
        return np.diff(self.before_offsets)


@dataclass(frozen=True)
class Headers:
    """The words between the parts of a prompt, as token ids. methods/delrec/config.py says what each is."""

    after: I32
    before: I32
    list: I32
    first: I32


class DistillPrompts:
    """Builds a prompt for each objective. num_candidates: m >= h. The prompt lists them if the builder lists candidates."""

    def __init__(
        self,
        builder: PromptBuilder,
        headers: Headers,
        *,
        seed: int,
        train_counts: I64,
        num_candidates: int,
        vocab_size: int,
        num_virtual: int,
    ) -> None:
        self._builder, self._headers, self._seed, self._num, self._counts = builder, headers, seed, num_candidates, train_counts
        begin = np.asarray(builder.pieces.begin, dtype=np.int32)
        # The second objective has its own ids for the same vectors, which keeps their gradients apart (models/soft_prompt.py).
        self._begins = (begin, np.where(begin >= vocab_size, begin + num_virtual, begin).astype(np.int32))

    def temporal(self, at: Place) -> GroupedPrompt:
        """Which item came right before the teacher's first choice?"""
        p, shown = at.position, at.listed[:1]
        group = np.concatenate([at.before[p - 1 :], self._draw(TEMPORAL, at, self._num - 1, np.concatenate([at.before, shown]))])
        headers = self._headers
        parts = [
            (None, self._recent(at.before[: p - 1])),
            (headers.after, at.before[p - 2 : p - 1]),
            (headers.before, at.before[p - 3 : p - 2]),
            (headers.after, shown),
        ]
        return self._prompt(TEMPORAL, at, parts, headers.before, group)

    def pattern(self, at: Place) -> GroupedPrompt:
        """What does the teacher place above the rest of its list?"""
        outside = np.concatenate([at.before, at.listed])
        group = np.concatenate([at.listed, self._draw(PATTERN, at, self._num - len(at.listed), outside)])
        parts = [(None, self._recent(at.before)), (self._headers.list, at.listed[1:])]
        return self._prompt(PATTERN, at, parts, self._headers.first, group)

    def _recent(self, items: I32) -> I32:
        return items[-self._builder.max_history :]

    def _draw(self, objective: int, at: Place, num: int, outside: I32) -> I32:
        sampler = NegativeSampler("uniform", num, stream_seed(self._seed, objective), self._counts)
        return sampler.draw(epoch=at.epoch, user=at.user, position=at.position, seen=outside, explicit_negatives=_NOTHING)

    def _prompt(
        self, objective: int, at: Place, parts: Sequence[tuple[I32 | None, I32]], question: I32, group: I32
    ) -> GroupedPrompt:
        """parts: (header, items) in order. The candidates follow if they are listed, then the question."""
        pieces, builder = self._builder.pieces, self._builder
        prefix = np.asarray(pieces.item_prefix, dtype=np.int32)
        if builder.listed:
            order = np.argsort(hash_u64(self._seed, _ORDER, objective, at.epoch, at.user, at.position, np.arange(len(group))))
            parts = [*parts, (np.asarray(pieces.candidates_header, dtype=np.int32), group[order])]
        tokens = [self._begins[objective]]
        for header, items in parts:
            tokens += [] if header is None else [header]
            for item in items.tolist():
                tokens += [prefix, builder.titles[item]]
        prompt = np.concatenate([*tokens, question, np.asarray(pieces.tail, dtype=np.int32)])
        return builder.branch_point(prompt, np.asarray([len(prompt) - 1]), [group], [2 * at.key + objective])

    def sizes(self, objective: int, at: Places) -> Sizes:
        """Those of the prompts of temporal() or pattern() at each place."""
        builder, headers, ends, listed = self._builder, self._headers, at.before_offsets[1:], at.listed
        if objective == TEMPORAL:
            words = 2 * (len(headers.after) + len(headers.before))
            answer, last, taken = at.before[ends - 1][:, None], ends - 1, listed[:, :1]
            shown = np.stack([at.before[ends - 2], at.before[ends - 3], listed[:, 0]], axis=1)
        else:
            words = len(headers.list) + len(headers.first)
            answer, last, taken, shown = listed, ends, listed, listed[:, 1:]
        group = np.concatenate([answer, self._draw_many(objective, at, self._num - answer.shape[1], taken)], axis=1)  # (U, m)
        read = np.minimum(last - at.before_offsets[:-1], builder.max_history)
        prompts = builder.prompt_lengths(at.before[runs(last - read, read)], offsets_of(read)) + words
        titles, prefix = builder.titles.lengths, len(builder.pieces.item_prefix)
        prompts += (titles[shown] + prefix).sum(axis=1)
        if builder.listed:
            prompts += len(builder.pieces.candidates_header) + (titles[group] + prefix).sum(axis=1)
        scored = (titles[group] + len(builder.pieces.end)).sum(axis=1)
        return Sizes(prompts + scored - self._num, np.ones_like(scored), scored, self._num * prompts + scored)

    def _draw_many(self, objective: int, at: Places, num: int, taken: I32) -> I32:
        """(U, num): _draw() at each place, outside the items before it and `taken` (U, t)."""
        sampler = NegativeSampler("uniform", num, stream_seed(self._seed, objective), self._counts)
        seen = SeenItems(*with_more(at.before, at.before_offsets, taken), num_items=len(self._counts))
        rows = np.arange(len(at.users))
        key = {"epochs": at.epochs, "users": at.users, "positions": at.positions}
        return sampler.draw_many(**key, seen=seen, rows=rows, counts=np.diff(seen.offsets))

    def longest(self, objective: int, top_h: int) -> tuple[int, int]:
        """(rows of the longest possible prompt, positions of its longest completion): all titles count as the longest."""
        builder, headers = self._builder, self._headers
        title = int(builder.titles.lengths.max()) + len(builder.pieces.item_prefix)
        items = builder.max_history + (3 if objective == TEMPORAL else top_h - 1) + builder.listed
        words = (
            2 * (len(headers.after) + len(headers.before)) if objective == TEMPORAL else len(headers.list) + len(headers.first)
        )
        words += len(self._begins[0]) + len(builder.pieces.candidates_header) + len(builder.pieces.tail)
        branch = title + len(builder.pieces.end)
        return words + title * items + self._num * branch, words + title * items + branch


def stream_seed(seed: int, batch: int) -> int:
    """A 63-bit seed whose draws are independent of all others of this run."""
    return int(hash_u64(seed, _ORDER, batch) >> np.uint64(1))
