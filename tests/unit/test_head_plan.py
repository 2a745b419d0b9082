"""The plan of the head: what it promises, by brute force; and that a call with a plan gives what a call without one gives."""

import doctest
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import rec_dist_kernels.chunks
from rec_dist_kernels import HeadPlan, completion_logps, plan_groups, preference_head, rows_of_chunk
from rec_dist_kernels.chunks import CHUNK_BYTES, CHUNK_ROWS, _add_product, plan_rows
from rec_dist_kernels.completion_logps import completion_logps_reference

T, D, V = 9, 4, 11
Scored = tuple[torch.Tensor, torch.Tensor, torch.Tensor]  # rows (M,), completion_offsets (N+1,), group_offsets (G+1,)


@st.composite
def scored(draw: st.DrawFn) -> Scored:
    """Groups of 0 to 4 completions of 0 to 4 tokens, whose rows repeat within and between groups."""
    groups = draw(st.lists(st.lists(st.integers(0, 4), max_size=4), max_size=6))
    lengths = [length for group in groups for length in group]
    rows = draw(st.lists(st.integers(0, T - 1), min_size=sum(lengths), max_size=sum(lengths)))
    offsets = [torch.tensor([0, *sizes]).cumsum(0) for sizes in (lengths, [len(group) for group in groups])]
    return torch.tensor(rows, dtype=torch.int64), offsets[0], offsets[1]


def check_tokens(plan: HeadPlan, rows: torch.Tensor) -> None:
    """Every token once, at a place of its row; the rows of a chunk ascend, so they are distinct."""
    assert sorted(plan.order.tolist()) == list(range(len(rows)))
    assert rows[plan.order].tolist() == plan.rows.repeat_interleave(plan.starts.diff()).tolist()
    assert all(plan.starts.diff() > 0)
    assert [chunk.first for chunk in plan.chunks] == [0, *(chunk.last for chunk in plan.chunks)][: len(plan.chunks)]
    assert (plan.chunks[-1].last if plan.chunks else 0) == len(plan.rows)
    for chunk in plan.chunks:
        assert all(a < b for a, b in pairwise(plan.rows[chunk.first : chunk.last].tolist()))


@settings(max_examples=200, deadline=None)
@given(scored(), st.integers(1, 20))
def test_chunks_are_whole_groups_that_fit(case: Scored, chunk_rows: int) -> None:
    rows, completions, groups = case
    plan = plan_groups(rows, completions, groups, chunk_rows=chunk_rows)
    check_tokens(plan, rows)
    tokens = completions[groups].tolist()  # where each group's tokens begin
    own = [len(rows[a:b].unique()) for a, b in pairwise(tokens)]  # distinct rows of each group
    covered = [number for chunk in plan.chunks for number in range(len(own))[chunk.groups]]
    assert covered == list(range(len(own)))
    for chunk in plan.chunks:
        first, last = tokens[chunk.groups.start], tokens[chunk.groups.stop]
        assert sorted(plan.order[plan.starts[chunk.first] : plan.starts[chunk.last]].tolist()) == list(range(first, last))
        assert chunk.completions == slice(int(groups[chunk.groups.start]), int(groups[chunk.groups.stop]))
        sizes = own[chunk.groups]
        assert sum(sizes) <= chunk_rows or len(sizes) == 1
        assert chunk.groups.stop == len(own) or sum(sizes) + own[chunk.groups.stop] > chunk_rows  # as full as may be


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 20))
def test_ranges_cut_a_plan_without_repeating_a_row(case: Scored, limit: int) -> None:
    rows, *offsets = case
    check_tokens(plan_rows(rows), rows)
    for plan in (plan_rows(rows), plan_groups(rows, *offsets, chunk_rows=5)):
        ranges = plan.ranges(limit)
        assert [place for first, last in ranges for place in range(first, last)] == list(range(len(plan.rows)))
        for first, last in ranges:
            assert 0 < last - first <= limit
            assert len(plan.rows[first:last].unique()) == last - first


@settings(max_examples=100, deadline=None)
@given(scored(), st.integers(1, 20), st.integers(1, 6))
def test_a_plan_changes_no_result(case: Scored, chunk_rows: int, limit: int) -> None:
    """Log-probs, the loss and the gradients, in float64, where chunks differ by the order of sums alone."""
    rows, completions, groups = case
    generator = torch.Generator().manual_seed(len(rows))
    hidden, weight = (torch.randn(size, D, generator=generator, dtype=torch.float64) for size in (T, V))
    targets = torch.randint(0, V, rows.shape, generator=generator)
    reference = torch.randn(len(completions) - 1, generator=generator, dtype=torch.float64)
    settings = {"kind": "sdpo", "beta": 0.3}
    given = (rows, targets, completions)
    found = []
    for plan in (None, plan_groups(rows, completions, groups, chunk_rows=chunk_rows)):
        leaves = [tensor.clone().requires_grad_() for tensor in (hidden, weight)]
        logps = completion_logps_reference(*leaves, *given, plan=plan, chunk_rows=limit)
        loss, _ = preference_head(*leaves, *given, reference, groups, **settings, plan=plan)
        total = loss + logps @ torch.linspace(1, 2, len(logps), dtype=torch.float64)
        found.append([logps.detach(), loss.detach(), *torch.autograd.grad(total, leaves)])
    for without, planned in zip(*found, strict=True):
        torch.testing.assert_close(planned, without, rtol=1e-12, atol=1e-13)


def test_the_plan_is_one_of_int32_offsets_too() -> None:
    rows, completions, groups = torch.tensor([3, 4, 3, 5]), torch.tensor([0, 2, 3, 4]), torch.tensor([0, 2, 3])
    long, short = (plan_groups(rows, completions.to(d), groups.to(d)) for d in (torch.int64, torch.int32))
    assert long.chunks == short.chunks
    assert all(torch.equal(*pair) for pair in zip(long[:3], short[:3], strict=True))


ROWS, COMPLETIONS, GROUPS = torch.tensor([0, 0, 2]), torch.tensor([0, 1, 3]), torch.tensor([0, 2])
HEAD = (torch.zeros(3, 2), torch.zeros(5, 2), ROWS, torch.tensor([4, 1, 0]), COMPLETIONS)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (
            plan_groups(torch.tensor([0, 2]), torch.tensor([0, 1, 2]), GROUPS),
            "one of these 3 rows on cpu, not of 2 tokens on cpu",
        ),
        (plan_groups(torch.tensor([0, 1, 2]), COMPLETIONS, GROUPS), "plan was made of other rows; make it anew with plan_groups"),
    ],
)
def test_a_plan_of_another_batch_is_rejected(plan: HeadPlan, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        completion_logps(*HEAD, plan=plan)
    with pytest.raises(ValueError, match=message):
        preference_head(*HEAD, torch.zeros(2), GROUPS, kind="sdpo", beta=1.0, plan=plan)


def test_a_plan_of_other_groups_is_rejected() -> None:
    plan = plan_groups(ROWS, COMPLETIONS, torch.tensor([0, 1, 2]))
    assert completion_logps(*HEAD, plan=plan).shape == (2,)  # which knows no groups
    with pytest.raises(ValueError, match="plan must cover the 1 groups of group_offsets, not 2"):
        preference_head(*HEAD, torch.zeros(2), GROUPS, kind="sdpo", beta=1.0, plan=plan)


@pytest.mark.parametrize("item_bytes", [2, 4])
@pytest.mark.parametrize("vocabulary", [1, 32_000, 128_256, 152_064, 262_144, 1_000_000])
def test_a_chunk_has_whole_tiles_and_bounded_memory(vocabulary: int, item_bytes: int) -> None:
    rows = rows_of_chunk(vocabulary, item_bytes)
    assert rows % 128 == 0
    assert (
        rows == CHUNK_ROWS or CHUNK_BYTES - 128 * (vocabulary + 64) * item_bytes < rows * vocabulary * item_bytes <= CHUNK_BYTES
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_added_in_float32(dtype: torch.dtype) -> None:
    """In bfloat16 the second product, 2, would vanish beside the first, 512."""
    total, ones = torch.zeros(3, 2), torch.ones(2, 2, dtype=dtype)
    for size in (512, 2):
        _add_product(total, torch.full((2, 3), size / 2, dtype=dtype).T, ones)
    assert total.tolist() == [[514.0] * 2] * 3


def test_torch_adds_products_to_float32_on_cuda() -> None:
    """The overload that _add_product calls on CUDA, which no CPU runs: its arguments are those of the installed PyTorch."""
    schema = torch.ops.aten.addmm.dtype_out._schema
    assert [argument.name for argument in schema.arguments] == ["self", "mat1", "mat2", "out_dtype", "beta", "alpha", "out"]
    total, factor = torch.zeros(2, 2), torch.ones(2, 2, dtype=torch.bfloat16)
    with pytest.raises(NotImplementedError, match=r"aten::addmm\.dtype_out"):
        torch.addmm(total, factor, factor, out_dtype=total.dtype, out=total)


def test_docstring_examples() -> None:
    result = doctest.testmod(rec_dist_kernels.chunks)
    assert (result.attempted, result.failed) == (2, 0)
