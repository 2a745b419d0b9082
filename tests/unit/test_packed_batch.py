"""The batch's index arithmetic against lists built one token at a time, and the mask against its definition in words."""

from dataclasses import fields

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_prompts import Tree, random_tree

from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.preference import sdpo, sft
from rec_dist.models.attention import visible
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist_kernels import plan_groups

VOCAB = 50


@st.composite
def forests(draw: st.DrawFn) -> list[Tree]:
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    shape = st.tuples(st.integers(1, 12), st.integers(1, 4))
    shapes = draw(st.lists(shape, min_size=1, max_size=4))
    return [random_tree(rng, vocab_size=VOCAB, prompt=prompt, groups=groups) for prompt, groups in shapes]


def pack(trees: list[Tree]) -> PackedBatch:
    return pack_prompts([tree.grouped_prompt(first_key=100 * number) for number, tree in enumerate(trees)])


def naive(trees: list[Tree]) -> dict[str, list[int]]:
    """Every field of the batch, appended token by token. `ancestors` holds what each row may see, in the design's words."""
    out: dict[str, list[int]] = {f.name: [] for f in fields(PackedBatch)}
    out["ancestors"] = []
    out["completion_offsets"], out["group_offsets"] = [0], [0]
    completion = 0
    for number, tree in enumerate(trees):
        start = len(out["input_ids"])
        for position, token in enumerate(tree.prompt):
            _row(out, token, position, number, -1, position, set(range(start, start + position + 1)))
        for group, (branch_point, answers) in enumerate(tree.groups):
            out["keys"].append(100 * number + group)
            for answer in answers:
                sees = set(range(start, start + branch_point + 1))  # its prompt up to the branch point ...
                previous = start + branch_point
                along = tree.along(branch_point, answer)
                for step, token in enumerate(answer):
                    out["rows"].append(previous)
                    out["targets"].append(token)
                    if along:
                        previous += 1  # the prompt's own rows, which hold these very tokens
                    elif step < len(answer) - 1:
                        previous = len(out["input_ids"])
                        sees = sees | {previous}  # ... and its own completion up to itself
                        _row(out, token, branch_point + 1 + step, number, completion, branch_point, sees)
                completion += 1
                out["completion_offsets"].append(len(out["targets"]))
            out["group_offsets"].append(completion)
    return out


def _row(out: dict[str, list], token: int, position: int, prompt: int, completion: int, limit: int, sees: set[int]) -> None:
    for name, value in zip(
        ("input_ids", "positions", "prompt_ids", "completion_ids", "limits", "ancestors"),
        (token, position, prompt, completion, limit, sees),
        strict=True,
    ):
        out[name].append(value)


@settings(max_examples=60, deadline=None)
@given(forests())
def test_a_micro_batch_is_what_appending_token_by_token_gives(trees: list[Tree]) -> None:
    batch, expected = pack(trees), naive(trees)
    index_fields = [name for name, values in expected.items() if values and name != "ancestors"]
    assert len(index_fields) == 10
    for name in index_fields:
        assert getattr(batch, name).tolist() == expected[name], name


@settings(max_examples=60, deadline=None)
@given(forests(), st.one_of(st.none(), st.integers(1, 8)))
def test_the_mask_is_its_definition(trees: list[Tree], window: int | None) -> None:
    expected = naive(trees)
    mask = visible(pack(trees), window=window)
    positions = expected["positions"]
    for row, sees in enumerate(expected["ancestors"]):
        near = {key for key in sees if window is None or positions[row] - positions[key] < window}
        assert set(torch.nonzero(mask[row]).flatten().tolist()) == near


@settings(max_examples=30, deadline=None)
@given(forests())
def test_counts_are_those_of_the_work_written_out(trees: list[Tree]) -> None:
    batch = pack(trees)
    pairs = [pair for tree in trees for pair in tree.written_out()]
    assert batch.num_logical_tokens == sum(len(prompt) + len(answer) for prompt, answer in pairs)
    assert batch.num_tokens == sum(tree.grouped_prompt().num_tokens for tree in trees)
    assert batch.num_groups == sum(len(tree.groups) for tree in trees) == len(batch.keys)
    assert sum(tree.grouped_prompt().num_scored for tree in trees) == len(batch.targets)


@settings(max_examples=30, deadline=None)
@given(forests())
def test_the_head_s_plan_is_of_the_batch_and_moves_with_it(trees: list[Tree]) -> None:
    batch = pack(trees)
    expected = plan_groups(batch.rows, batch.completion_offsets, batch.group_offsets)
    for plan in (batch.plan, batch.padded_to(batch.num_tokens + 7).plan):
        assert plan.chunks == expected.chunks
        assert all(torch.equal(*pair) for pair in zip(plan[:3], expected[:3], strict=True))
    moved = batch.to("meta").plan
    assert {tensor.device.type for tensor in moved[:3]} == {"meta"}
    assert moved.chunks == expected.chunks


def test_completion_weights_follow_their_group() -> None:
    rng = np.random.default_rng(0)
    batch = pack([random_tree(rng, vocab_size=VOCAB, prompt=5, groups=3)])
    object.__setattr__(batch, "weights", torch.tensor([1.0, 0.0, 2.0]))
    sizes = batch.group_offsets.diff().tolist()
    assert batch.completion_weights.tolist() == [1.0] * sizes[0] + [0.0] * sizes[1] + [2.0] * sizes[2]
    assert batch.num_groups == 2


def test_a_reference_is_kept_and_nothing_else_changes() -> None:
    batch = pack([random_tree(np.random.default_rng(1), vocab_size=VOCAB, prompt=5, groups=2)])
    logps = torch.arange(len(batch.reference_logps), dtype=torch.float64) - 3
    changed = batch.with_reference(logps)
    assert changed.reference_logps.dtype == torch.float32
    assert changed.reference_logps.tolist() == logps.tolist()
    assert not batch.reference_logps.any()
    assert changed.rows is batch.rows


@pytest.mark.parametrize("method", [sft(), sdpo(beta=0.7, num_negatives=3)], ids=lambda method: method.name)
def test_a_dummy_batch_adds_nothing_to_loss_count_metrics_or_gradient(method: Objective) -> None:
    batch = dummy_batch(method.num_negatives)
    assert batch.num_groups == 0
    assert batch.num_logical_tokens == 0
    logps = torch.linspace(-3, -1, 1 + method.num_negatives).requires_grad_()
    loss, count, metrics = method.loss(logps, batch)
    loss.backward()
    assert loss.item() == 0
    assert count.item() == 0
    assert all(value.item() == 0 for value in metrics.values())
    assert not logps.grad.any()


def test_a_dummy_batch_has_a_graph_so_that_every_rank_runs_a_backward_pass() -> None:
    logps = torch.zeros(1, requires_grad=True)
    assert sft().loss(logps, dummy_batch(0))[0].requires_grad
