"""packing/transfer.py on a pretended GPU: one copy from pinned memory a batch, whatever is in it.

test_pretended_cuda.py runs this file as it runs cases.py.
"""

import pickle
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from pretended.pretend import pretending
from random_prompts import random_tree
from torch import Tensor

from rec_dist.methods.sequential.sequences import lay_out
from rec_dist.packing.packed_batch import pack_prompts
from rec_dist.packing.pooled_prompts import pack_pooled_prompts
from rec_dist.packing.transfer import ALIGNMENT, packed_up, staged, to_device, unpacked

GPU = "cuda:0"


class Plan(NamedTuple):
    rows: Tensor
    chunks: list[Tensor]
    bounds: list[int]


@dataclass(frozen=True)
class Nested:
    mask: Tensor
    plan: Plan
    scale: Tensor
    empty: Tensor
    name: str


def nested() -> Nested:
    plan = Plan(torch.arange(5), [torch.arange(3, dtype=torch.int32), torch.ones(2, 3, dtype=torch.bfloat16)], [0, 3])
    return Nested(torch.tensor([True, False, True]), plan, torch.tensor(2.5), torch.empty(0, 4), "kept")


def prompts() -> Any:
    rng = np.random.default_rng(0)
    return pack_prompts([random_tree(rng, vocab_size=50, prompt=9, groups=2).grouped_prompt() for _ in range(3)])


BATCHES = {
    "nested": nested,
    "prompts": prompts,
    "pooled prompts": lambda: pack_pooled_prompts([np.arange(4, dtype=np.int32), np.arange(2, dtype=np.int32)], [2, 1]),
    "sequences": lambda: lay_out([np.arange(4, dtype=np.int32)], [np.arange(2, dtype=np.int32)]),
    "a tensor": lambda: torch.arange(6).view(2, 3),
    "strided": lambda: (torch.arange(6).view(2, 3).T, torch.arange(9)[::2]),
}


def tensors_of(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    parts = value if isinstance(value, tuple | list) else vars(value).values() if hasattr(value, "__dict__") else ()
    return [tensor for part in parts for tensor in tensors_of(part)]


@pytest.mark.parametrize("before", [False, True], ids=["as it is", "staged"])
@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_goes_in_one_copy(name: str, before: bool) -> None:
    batch = BATCHES[name]()
    expected = [tensor.clone() for tensor in tensors_of(batch)]
    with pretending() as gpu:
        sent = to_device(staged(batch, GPU) if before else batch, GPU)
        happened, found = gpu.take(), tensors_of(sent)
        assert (happened.to_gpu, happened.waits) == (1, [])
        assert all(tensor.device == torch.device(GPU) and tensor.is_contiguous() for tensor in found)
        assert all(tensor.storage_offset() * tensor.element_size() % ALIGNMENT == 0 for tensor in found)
        assert to_device(sent, GPU) is sent and to_device(sent, "cuda") is sent
        assert gpu.take().to_gpu == 0
    assert len(found) == len(expected)
    for tensor, value in zip(found, expected, strict=True):
        assert tensor.dtype == value.dtype and torch.equal(tensor, value)


@pytest.mark.parametrize("name", BATCHES)
def test_a_batch_of_another_process_is_the_same(name: str) -> None:
    batch = BATCHES[name]()
    sent = pickle.dumps(packed_up(batch))
    assert len(sent) < 20_000 and b"_rebuild_tensor" not in sent
    received = unpacked(pickle.loads(sent))
    expected, found = tensors_of(batch), tensors_of(received)
    assert type(received) is type(batch) and len(found) == len(expected) > 0
    for tensor, value in zip(found, expected, strict=True):
        assert tensor.dtype == value.dtype and tensor.shape == value.shape and torch.equal(tensor, value)
    with pretending() as gpu:
        assert len(tensors_of(to_device(staged(received, GPU), GPU))) == len(expected)
        happened = gpu.take()
    assert (happened.to_gpu, happened.waits) == (1, [])


def test_what_is_no_tensor_stays() -> None:
    with pretending():
        sent = to_device(nested(), GPU)
    assert (
        sent.name == "kept" and sent.plan.bounds == [0, 3] and isinstance(sent.plan, Plan) and isinstance(sent.plan.chunks, list)
    )


def test_a_changed_part_goes_along_in_the_same_copy() -> None:
    with pretending() as gpu:
        batch = replace(staged(prompts(), GPU), weights=torch.full((6,), 3.0))
        sent = batch.to(GPU)
        happened = gpu.take()
    assert (happened.to_gpu, happened.waits) == (1, [])
    assert sent.weights.tolist() == [3.0] * 6


def test_what_is_on_the_gpu_stays_there() -> None:
    """As with the scores of an online reference."""
    with pretending() as gpu:
        batch = prompts().to(GPU)
        logps = torch.ones(len(batch.reference_logps), device=GPU)
        gpu.take()
        again = batch.with_reference(logps).to(GPU)
        happened = gpu.take()
    assert (happened.to_gpu, happened.waits) == (0, [])
    assert again.reference_logps is logps and again.rows is batch.rows


@pytest.mark.parametrize("name", BATCHES)
def test_on_a_cpu_nothing_is_copied(name: str) -> None:
    batch = BATCHES[name]()
    assert staged(batch, "cpu") is batch and to_device(batch, "cpu") is batch
