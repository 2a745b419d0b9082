"""Examples built all at once equal those built one by one, array for array, for any prompt, negatives and catalogue."""

from collections.abc import Callable
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rec_dist.config.schema import RunConfig
from rec_dist.data.sampling.many_draws import SeenItems
from rec_dist.data.sampling.negatives import NegativeSampler, draw_candidates, draw_many_candidates
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.registry import build_task
from rec_dist.packing.grouped_prompt import GroupedPrompt

CASES = {
    "sdpo": ("negatives.num=3",),
    "many negatives": ("negatives.num=15",),
    "a crowded catalogue": ("negatives.num=40",),
    "sft": ("task.kind=sft",),
    "timelines": ("train.targets_per_prompt=4", "negatives.num=5"),
    "popularity": ("negatives.kind=popularity", "train.targets_per_prompt=4"),
    "explicit negatives": ("negatives.kind=low_rated", "train.targets_per_prompt=4", "negatives.num=5"),
    "new negatives each epoch": ("negatives.refresh_each_epoch=true", "train.targets_per_prompt=4"),
    "chat": ("prompt.style=chat", "prompt.end=<eos>"),
    "listed": ("prompt.candidates=listed", "evaluate.num_candidates=20"),
    "margins": ("task.kind=recpo", "train.targets_per_prompt=4", "negatives.num=20"),
    "no history": ("prompt.max_history=1", "prompt.instruction=x", "train.targets_per_prompt=8"),
}


def same(left: GroupedPrompt, right: GroupedPrompt) -> bool:
    pairs = [(getattr(left, f.name), getattr(right, f.name)) for f in fields(GroupedPrompt)]
    return all(a is b is None or (a.dtype == b.dtype and np.array_equal(a, b)) for a, b in pairs)


@pytest.fixture
def make_task(tiny_config: Callable[..., dict[str, Any]], tiny_model_dir: Path, tmp_path: Path) -> Callable[..., Any]:
    def make(*changes: str) -> Any:
        config = RunConfig.model_validate(
            tiny_config(tmp_path / "run", "task.kind=sdpo", "train.max_tokens_per_micro_batch=4096", *changes)
        )
        return build_task(config, InitialWeights(tiny_model_dir), "cpu")

    return make


@pytest.mark.parametrize("name", sorted(CASES))
def test_examples_built_together_are_those_built_alone(name: str, make_task: Callable[..., Any]) -> None:
    task = make_task(*CASES[name])
    indices = np.tile(np.arange(task.sampler.num_examples), 2)[::-1].copy()
    epochs = np.repeat([1, 0], task.sampler.num_examples)
    drawn = task.data.draw(indices, epochs)
    built = drawn.build(range(len(indices)))
    assert len(built) == len(indices)
    for prompt, index, epoch in zip(built, indices.tolist(), epochs.tolist(), strict=True):
        assert same(prompt, task.data.example(index, epoch))
    if name == "timelines":  # otherwise nothing would have tested chosen items that stand on the prompt
        assert any((prompt.input_lengths == 0).any() for prompt in built)


def test_no_examples_are_none(make_task: Callable[..., Any]) -> None:
    nothing = np.empty(0, dtype=np.int64)
    for case in ((), ("prompt.candidates=listed", "evaluate.num_candidates=20")):
        drawn = make_task(*case).data.draw(nothing, nothing)
        assert drawn.build([]) == [] and drawn.sizes.num_tokens.tolist() == []


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from(["uniform", "popularity"]),
    st.integers(1, 12),
    st.lists(st.lists(st.integers(0, 59), min_size=1, max_size=20), min_size=1, max_size=6),
    st.integers(0, 2**32),
)
def test_many_draws_are_each_draw(kind: Any, num: int, rows: list[list[int]], seed: int) -> None:
    """Rows may repeat an item here, and each target sees a different part of its row."""
    rng = np.random.default_rng(seed)
    sampler = NegativeSampler(kind, num, seed % 1000, rng.integers(0, 9, size=60) + (np.arange(60) == 7))
    examples = rng.integers(0, len(rows), size=9)
    positions = np.asarray([rng.integers(len(rows[example])) for example in examples])
    epochs, users = rng.integers(0, 3, size=9), rng.integers(0, 10**12, size=9)
    seen = np.asarray([item for row in rows for item in row], dtype=np.int32)
    offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows])])
    key = {"epochs": epochs, "users": users, "positions": positions}
    found = sampler.draw_many(**key, seen=SeenItems(seen, offsets, 60), rows=examples, counts=positions + 1)
    for j, example in enumerate(examples.tolist()):
        own = np.asarray(rows[example][: positions[j] + 1], dtype=np.int32)
        one = {"epoch": int(epochs[j]), "user": int(users[j]), "position": int(positions[j])}
        assert found[j].tolist() == sampler.draw(**one, seen=own, explicit_negatives=own[:0]).tolist()


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 30), st.lists(st.integers(2, 25), min_size=1, max_size=6), st.integers(0, 2**32))
def test_many_lists_of_candidates_are_each_list(num: int, lengths: list[int], seed: int) -> None:
    """Catalogues from crowded to roomy."""
    rng = np.random.default_rng(seed)
    num_items = int(rng.integers(max(lengths) + num, 200))
    rows = [rng.permutation(num_items)[:length].astype(np.int32) for length in lengths]
    owners = rng.integers(0, len(rows), size=7)
    positions = np.asarray([rng.integers(1, len(rows[owner])) for owner in owners])
    seeds, users = rng.integers(0, 2**62, size=7), rng.integers(0, 10**12, size=7)
    seen = SeenItems(np.concatenate(rows), np.concatenate([[0], np.cumsum(lengths)]), num_items)
    found = draw_many_candidates(seeds=seeds, users=users, positions=positions, seen=seen, rows=owners, num=num)
    for j, (owner, position) in enumerate(zip(owners.tolist(), positions.tolist(), strict=True)):
        key = {"seed": int(seeds[j]), "user": int(users[j]), "position": position, "target": int(rows[owner][position])}
        assert found[j].tolist() == draw_candidates(**key, history=rows[owner][:position], num=num, num_items=num_items).tolist()


def test_many_draws_from_too_small_a_catalogue_are_refused_as_one_is() -> None:
    sampler = NegativeSampler("uniform", 5, 0, np.ones(6, dtype=np.int64))
    one = np.zeros(1, dtype=np.int64)
    seen = np.asarray([1, 2], dtype=np.int32)
    rows = SeenItems(seen, np.asarray([0, 2]), 6)
    with pytest.raises(UserError, match=r"negatives\.num asks for 5 .*only 4 left"):
        sampler.draw_many(epochs=one, users=one, positions=one + 1, seen=rows, rows=one, counts=one + 2)
