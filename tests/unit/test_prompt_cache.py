"""Prompts that are kept between calls: the same scores as without, whatever histories do, within the bound, and counted."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from http_clients import serving
from hypothesis import given
from hypothesis import strategies as st

import rec_dist
from rec_dist.commands.ranked_model import ranked_model
from rec_dist.commands.serve import ServeOptions, running
from rec_dist.errors import UserError
from rec_dist.methods.language_model.scorer import LanguageModelScorer
from rec_dist.models.prompt_cache import PromptCache, PromptCounts
from rec_dist.runtime.arrays import I32

Make = Callable[..., dict[str, Any]]
NUM_ITEMS = 80


@pytest.fixture(scope="module")
def run(tiny_config: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    return rec_dist.train(tiny_config(folder / "run", "task.kind=sft", "prompt.max_history=4")).path


def scorers(run: Path, *overrides: str) -> Iterator[LanguageModelScorer]:
    with ranked_model(run, overrides).scorer() as scorer:
        assert isinstance(scorer, LanguageModelScorer)
        yield scorer


def layers(tokens: list[int]) -> Any:
    """4 bytes a token: its own id, so that what comes back can be compared."""
    return [(torch.tensor([[tokens]], dtype=torch.int16).mT, torch.tensor([[tokens]], dtype=torch.int16).mT)]


@given(st.lists(st.lists(st.integers(0, 2), min_size=1, max_size=9), max_size=40), st.integers(10, 120))
def test_the_longest_kept_beginning_is_found_within_the_bound(prompts: list[list[int]], max_bytes: int) -> None:
    cache, kept = PromptCache(max_bytes), list[list[int]]()  # the least recently used first
    for tokens in prompts:
        same = lambda other, tokens=tokens: next(
            (place for place, pair in enumerate(zip(other, tokens, strict=False)) if pair[0] != pair[1]),
            min(len(other), len(tokens)),
        )
        found, own = cache.find(0, np.asarray(tokens), 0)
        best = max(map(same, kept), default=0)
        assert found == min(best, len(tokens) - 1)
        if found:
            values = own[0][0][0, :, 0].tolist()
            assert values[:found] == tokens[:found]
            kept.append(kept.pop(kept.index(values)))
        assert cache.find(1, np.asarray(tokens), 0)[0] == 0, "another model"
        cache.keep(0, np.asarray(tokens), layers(tokens))
        if 4 * len(tokens) <= max_bytes and not any(other[: len(tokens)] == tokens for other in kept):
            kept = [other for other in kept if tokens[: len(other)] != other] + [tokens]
        while sum(4 * len(other) for other in kept) > max_bytes:
            kept.pop(0)
        assert len(cache) == len(kept)
        assert cache.num_bytes == sum(4 * len(other) for other in kept) <= max_bytes


def next_history(rng: np.random.Generator, history: I32) -> I32:
    """Grown, shrunk, changed in the middle, the same, or another."""
    kind, item = int(rng.integers(5)), np.asarray([rng.integers(NUM_ITEMS)], dtype=np.int32)
    if kind == 0:
        return np.concatenate([history, item])
    if kind == 1 and len(history) > 1:
        return history[:-1]
    if kind == 2:
        changed = history.copy()
        changed[rng.integers(len(history))] = item[0]
        return changed
    return history if kind == 3 else rng.integers(0, NUM_ITEMS, rng.integers(1, 7)).astype(np.int32)


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("max_bytes", [1 << 30, 60_000])
def test_scores_are_those_without_kept_prompts(run: Path, attention: str, max_bytes: int) -> None:
    """Histories go beyond prompt.max_history (4), where each new item moves the window; the small cache forgets."""
    rng, cache, counts = np.random.default_rng(3), PromptCache(max_bytes), PromptCounts()
    for plain in scorers(run, f"model.attention={attention}"):
        for keeping in scorers(run, f"model.attention={attention}"):
            keeping.keep_prompts(cache)
            cache.take_counts()
            histories = [rng.integers(0, NUM_ITEMS, 2).astype(np.int32) for _ in range(3)]
            for _ in range(25):
                histories = [next_history(rng, history) for history in histories]
                candidates = [rng.choice(NUM_ITEMS, int(rng.integers(1, 9)), replace=False).astype(np.int32) for _ in histories]
                for found, wanted in zip(keeping.score(histories, candidates), plain.score(histories, candidates), strict=True):
                    np.testing.assert_allclose(found, wanted, rtol=0, atol=1e-5)
                assert cache.num_bytes <= max_bytes
            counts = cache.take_counts()
    assert counts.hits > 5 and counts.extensions > 5 and counts.misses > 1
    assert counts.hits + counts.extensions + counts.misses == 75
    assert (counts.evictions > 0) is (max_bytes < 1 << 30)


def test_a_long_list_runs_its_prompt_once_in_a_call_and_keeps_nothing(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As `rec-dist rank` asks: a catalogue in pieces that fit a micro-batch. Two calls give the same bits."""
    every, history = np.arange(NUM_ITEMS, dtype=np.int32), np.asarray([3, 10], dtype=np.int32)
    found, take = list[PromptCounts](), PromptCache.take_counts
    made = list[PromptCache]()
    monkeypatch.setattr(PromptCache, "__init__", _noting(made))
    for scorer in scorers(run, "train.max_tokens_per_micro_batch=128"):
        first, second = (scorer.score([history], [every])[0] for _ in range(2))
        assert first.tolist() == second.tolist()
        found = [take(cache) for cache in made[-2:]]
    for counts in found:
        assert counts.hits >= 2 and counts.misses == 1, counts
    for scorer in scorers(run):
        np.testing.assert_allclose(first, scorer.score([history], [every])[0], rtol=0, atol=1e-5)


def _noting(made: list[PromptCache]) -> Callable[[PromptCache, int], None]:
    plain = PromptCache.__init__

    def init(self: PromptCache, max_bytes: int) -> None:
        plain(self, max_bytes)
        made.append(self)

    return init


def outcomes(client: Any) -> dict[str, float]:
    text = client.get("/metrics").body
    return {
        name: float(value) for name, value in re.findall(r'^rec_dist_serve_prompts_total\{outcome="(\w+)"\} (\S+)$', text, re.M)
    }


def test_the_server_keeps_prompts_and_says_how_many(run: Path) -> None:
    body = {"history": ["i003", "i010"], "candidates": ["i020", "i044"], "exclude_seen": False}
    longer = {**body, "history": [*body["history"], "i017"]}
    with serving(run, prompt_cache_mib=0) as client:
        wanted = [client.post("/v1/rank", asked).body["items"] for asked in (body, longer, body)]
        assert sum(outcomes(client).values()) == 0
    with serving(run) as client:
        found = [client.post("/v1/rank", asked).body["items"] for asked in (body, longer, body)]
        assert outcomes(client) == {"miss": 1.0, "extension": 1.0, "hit": 1.0}
    for ours, theirs in zip(found, wanted, strict=True):
        assert [item["item_id"] for item in ours] == [item["item_id"] for item in theirs]
        assert [item["score"] for item in ours] == pytest.approx([item["score"] for item in theirs], abs=1e-5)


def test_a_negative_size_is_refused(run: Path) -> None:
    with pytest.raises(UserError, match="--prompt-cache-mib"), running(run, (), ServeOptions(port=0, prompt_cache_mib=-1)):
        pass
