"""The trie of titles against sets of Python tuples, and what its plan says that a token competes with."""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.config.schema import PromptConfig, RunConfig
from rec_dist.data.dataset.ragged import offsets_of
from rec_dist.data.prompts import title_trie
from rec_dist.data.prompts.builder import build_prompt_builder
from rec_dist.data.prompts.title_trie import TitleTrie, build_trie, trie_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch
from rec_dist_kernels import AllowedPlan

TITLES = [[1, 2, 0], [1, 3, 0], [1, 2, 4, 0], [5, 0], [5, 0]]


def flat(sequences: list[list[int]]) -> tuple[Any, Any]:
    tokens = np.asarray([token for sequence in sequences for token in sequence], dtype=np.int32)
    return tokens, offsets_of(np.asarray([len(sequence) for sequence in sequences], dtype=np.int64))


def children(trie: TitleTrie, node: int) -> list[int]:
    return trie.child_tokens[trie.child_offsets[node] : trie.child_offsets[node + 1]].tolist()


def allowed_by(sequences: list[list[int]], prefix: list[int]) -> set[int]:
    return {sequence[len(prefix)] for sequence in sequences if sequence[: len(prefix)] == prefix and len(sequence) > len(prefix)}


def what_competes(plan: AllowedPlan) -> list[tuple[int, int, int, frozenset[int]]]:
    """(completion, row, token, what it competes with) of every token in the plan."""
    found = []
    for chunk in plan.chunks:
        words = plan.words[chunk.words].tolist()
        assert len(set(words)) == len(words)
        sets: list[set[int]] = [set() for _ in range(chunk.num_nodes)]
        for pair in plan.pairs[chunk.pairs].tolist():
            sets[pair // len(words)].add(words[pair % len(words)])
        rows, nodes = plan.rows[chunk.choices].tolist(), plan.nodes[chunk.choices].tolist()
        for choice, target, completion in zip(
            plan.choices[chunk.tokens].tolist(),
            plan.targets[chunk.tokens].tolist(),
            plan.completions[chunk.tokens].tolist(),
            strict=True,
        ):
            found.append((completion, rows[choice], words[target], frozenset(sets[nodes[choice]])))
    return found


def test_a_trie_by_hand() -> None:
    trie = trie_of(*flat(TITLES))
    assert trie.num_nodes == 1 + 9  # (), and (1) (5) (1 2) (1 3) (5 0) (1 2 0) (1 2 4) (1 3 0) (1 2 4 0)
    assert children(trie, 0) == [1, 5]
    tokens, offsets = flat([[1, 2, 4, 0], [5, 0], [1, 3, 0]])
    nodes = trie.nodes_of(tokens.astype(np.int64), offsets).tolist()
    assert [children(trie, node) for node in nodes] == [[1, 5], [2, 3], [0, 4], [0], [1, 5], [0], [1, 5], [2, 3], [0]]


def test_a_completion_that_is_no_title_is_our_mistake() -> None:
    tokens, offsets = flat([[1, 4, 0]])
    with pytest.raises(AssertionError, match="no title of the catalogue"):
        trie_of(*flat(TITLES)).nodes_of(tokens.astype(np.int64), offsets)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.lists(st.integers(0, 4), min_size=1, max_size=6), min_size=1, max_size=25))
def test_a_trie_is_the_set_of_beginnings(sequences: list[list[int]]) -> None:
    trie = trie_of(*flat(sequences))
    beginnings = {tuple(sequence[:length]) for sequence in sequences for length in range(len(sequence) + 1)}
    assert trie.num_nodes == len(beginnings)
    tokens, offsets = flat(sequences)
    nodes, place = trie.nodes_of(tokens.astype(np.int64), offsets).tolist(), 0
    for sequence in sequences:
        for length in range(len(sequence)):
            assert set(children(trie, nodes[place])) == allowed_by(sequences, sequence[:length])
            place += 1


def test_an_empty_catalogue_has_the_empty_beginning() -> None:
    trie = trie_of(*flat([]))
    assert (trie.num_nodes, children(trie, 0)) == (1, [])


def test_a_builder_s_trie_holds_its_completions(tiny_tokenizer: Any) -> None:
    titles = ["Silent River", "Silent Night", "Golden River", "Silent"]
    builder = build_prompt_builder(PromptConfig(), tiny_tokenizer, titles)
    completions = [builder.completion(item).tolist() for item in range(len(titles))]
    trie, expected = build_trie(builder), trie_of(*flat(completions))
    assert trie.child_tokens.tolist() == expected.child_tokens.tolist()
    assert trie.child_offsets.tolist() == expected.child_offsets.tolist()


@pytest.fixture
def msl_batch(tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path) -> tuple[Any, PackedBatch]:
    words = ("task.kind=msl", "task.msl.temperature=2", "train.targets_per_prompt=4", "train.max_tokens_per_micro_batch=4096")
    config = RunConfig.model_validate(tiny_config(tmp_path / "run", *words))
    task = build_task(config, InitialWeights(tiny_model_dir), "cpu")
    indices = np.arange(task.sampler.num_examples)
    drawn = task.data.draw(indices, np.zeros_like(indices))
    return task, task.data.collate(drawn.build(range(len(indices))), step=0)


@pytest.mark.parametrize("chunk_logits", [title_trie.CHUNK_LOGITS, 300, 1])
def test_a_plan_says_what_each_token_competes_with(
    chunk_logits: int, msl_batch: tuple[Any, PackedBatch], monkeypatch: pytest.MonkeyPatch
) -> None:
    task, batch = msl_batch
    monkeypatch.setattr(title_trie, "CHUNK_LOGITS", chunk_logits)
    plan = build_trie(task.data.builder).plan(batch, 2.0)
    builder = task.data.builder
    catalogue = [builder.completion(item).tolist() for item in range(len(builder.titles.lengths))]
    expected, ends = [], batch.completion_offsets.tolist()
    for completion, (start, stop) in enumerate(pairwise(ends)):
        for place in range(start, stop):
            allowed = allowed_by(catalogue, batch.targets[start:place].tolist())
            if len(allowed) > 1:
                expected.append((completion, int(batch.rows[place]), int(batch.targets[place]), frozenset(allowed)))
    assert sorted(what_competes(plan), key=str) == sorted(expected, key=str)
    assert 0 < len(expected) < len(batch.targets), "there are tokens with a choice, and tokens without"
    assert plan.completions[plan.order].tolist() == sorted(plan.completions.tolist())
    assert plan.offsets.diff().tolist() == torch.bincount(plan.completions, minlength=len(ends) - 1).tolist()
    sizes = [(chunk.choices.stop - chunk.choices.start) * (chunk.words.stop - chunk.words.start) for chunk in plan.chunks]
    assert max(sizes) <= max(chunk_logits, 40 * 80)  # a choice alone may be larger
    if chunk_logits == 1:
        assert all(chunk.choices.stop - chunk.choices.start == 1 for chunk in plan.chunks)


def test_the_batch_of_a_task_has_its_plan(msl_batch: tuple[Any, PackedBatch]) -> None:
    task, batch = msl_batch
    assert batch.allowed is not None and batch.allowed.temperature == 2.0
    assert task.data.collate([], step=0).allowed is None and dummy_batch(0).allowed is None


def test_chunks_of_wide_and_narrow_choices_are_apart() -> None:
    """The first tokens of 200 titles are not multiplied with the rows of two."""
    trie = trie_of(*flat([[first, second] for first in range(200) for second in (7, 9)]))
    batch = PackedBatch(
        *(torch.zeros(1, dtype=torch.int64),) * 5,
        torch.arange(6), torch.tensor([3, 7, 5, 9, 8, 7]), torch.tensor([0, 2, 4, 6]), torch.arange(4), torch.zeros(3),
        torch.ones(3), torch.zeros(3), np.zeros((1, 2), dtype=np.int64), 0, None,  # type: ignore[arg-type]
    )  # fmt: skip
    plan = trie.plan(batch, 1.0)
    words = [chunk.words.stop - chunk.words.start for chunk in plan.chunks]
    assert words == [200, 2]
    assert plan.rows.tolist() == [0, 2, 4, 1, 3, 5]
