"""How many titles does the base language model know by heart? What it knows of them, it may have read with the test data.

A title of at least two words is known if greedy decoding writes its second half, word for word, after its first half. Chance is how
often the model writes the second half of another title there: what grammar alone gives. Such a model is not wrong, but part of
what it scores is not from your data (Di Palma et al., Do LLMs Memorize Recommendation Datasets?, arXiv 2505.10212).

Cost: one forward pass of a title for each of MOST_TITLES titles.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from rec_dist.auditing.chance import binomial_tail, percent, probability
from rec_dist.auditing.check import Check, Outcome
from rec_dist.auditing.questions import AuditedModel, Subject
from rec_dist.data.prompts.tokens import begin_tokens, load_tokenizer
from rec_dist.models.language import load_language_model
from rec_dist.runtime.rng import hash_u64

MOST_TITLES, _SAMPLE = 500, 5


@dataclass(frozen=True)
class _Halves:
    """The tokens of a title's first words, with what begins every text, and those of the rest."""

    first: list[int]
    rest: list[int]


def _halves(tokenizer: Any, title: str) -> _Halves | None:
    """None for a title of one word, and where a token spans the two halves."""
    words = title.split()
    middle = len(words) // 2
    if not middle:
        return None
    first, whole = (tokenizer(text, add_special_tokens=False).input_ids for text in (" ".join(words[:middle]), " ".join(words)))
    if whole[: len(first)] != first or len(whole) == len(first):
        return None
    return _Halves(begin_tokens(tokenizer) + list(first), list(whole[len(first) :]))


@torch.no_grad()
def written(model: Any, halves: _Halves) -> list[int]:
    """What greedy decoding writes behind the first half, up to the first token that differs from the rest."""
    tokens = torch.tensor([halves.first + halves.rest])
    best = model(input_ids=tokens).logits[0].argmax(-1)[len(halves.first) - 1 : -1].tolist()
    agreed = next((n for n, (a, b) in enumerate(zip(best, halves.rest, strict=True)) if a != b), len(best))
    return [int(token) for token in best[:agreed]]


def known_titles(audited: AuditedModel, titles: list[str], seed: int) -> tuple[int, int, int]:
    """(titles asked, known, second halves of another title that were written in their place)."""
    assert audited.base is not None
    tokenizer = load_tokenizer(audited.base, trust_remote_code=audited.trust_remote_code)
    order = np.argsort(hash_u64(seed, _SAMPLE, np.arange(len(titles))), kind="stable")
    halves: list[_Halves] = []
    for item in order.tolist():
        cut = _halves(tokenizer, titles[item])
        halves += [cut] if cut is not None else []
        if len(halves) == MOST_TITLES:
            break
    model: Any = load_language_model(
        audited.base, dtype=torch.float32, attention="sdpa", trust_remote_code=audited.trust_remote_code
    ).eval()
    rests = [one.rest for one in halves]
    known = sum(written(model, one) == one.rest for one in halves)
    others = [rests[(place + 1) % len(rests)] for place in range(len(rests))]
    crossed = [_Halves(one.first, other) for one, other in zip(halves, others, strict=True) if other != one.rest]
    return len(halves), known, sum(written(model, one) == one.rest for one in crossed)


def _run(subject: Subject) -> Outcome:
    assert subject.model is not None and subject.data is not None
    asked, known, by_chance = known_titles(subject.model, subject.data.titles, subject.seed)
    if not asked:
        return Outcome(skipped="no title has two words that tokenize apart.")
    rate = (by_chance + 1) / (asked + 1)
    tail = binomial_tail(known, asked, rate)
    measured = (
        f"The base model writes the second half of {known:,} of {asked:,} titles ({percent(known / asked)}) word for word; of "
        f"another title in its place, {by_chance:,} ({probability(tail)})."
    )
    fault = "The base model knows these titles by heart; compare with the base model's own row, and with data newer than it."
    return Outcome.of_tail(measured, fault, tail)


MEMORISED = Check("memorised", "How many titles does the base model know by heart?", "language model", _run)
