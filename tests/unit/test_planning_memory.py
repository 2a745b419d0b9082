"""Memory by numbers worked out by hand, by what autograd saves, and by what must be monotone."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_prompts import random_tree

from rec_dist.models.attention_paths import masks_for
from rec_dist.models.known_decoders import Architecture, Parameters
from rec_dist.models.language import LoraSpec, add_lora
from rec_dist.models.per_prompt import PER_PROMPT, register
from rec_dist.models.size import WeightCount
from rec_dist.models.soft_prompt import add_soft_prompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.sizing.memory import Setup, activation_bytes, gradient_bytes, layer_bytes, memory, optimizer_bytes
from rec_dist.sizing.shares import Zero, gathered_sizes, held_parameters, kept_elements, live_elements, persistent_shards, shard

SHAPE = Architecture(width=8, inner=16, layers=2, heads=2, kv_heads=1, head_dim=4, vocabulary=50, max_positions=None)
PARAMETERS = Parameters((10, 7, 4), (False, True, True), head=10, tied=False, adapted=14, work=WeightCount(17, 4, 10, False))
STAGE_3 = Zero(3, persistence=7, reuse=100, prefetch=5, bucket=50)


def setup(**changes: Any) -> Setup:
    base = Setup(
        shape=SHAPE,
        parameters=PARAMETERS,
        zero=STAGE_3,
        workers=2,
        element=2,
        max_tokens=256,
        attention="flex",
        checkpointing=False,
        rank=2,
        on_gpu=True,
    )
    return replace(base, **changes)


def total(value: Setup) -> float:
    return sum(memory(value, reserved=1.0, margin=0.1).values())


def test_a_shard_is_padded() -> None:
    assert [shard(10, 1), shard(10, 2), shard(10, 3), shard(1, 8)] == [10, 5, 4, 1]


@pytest.mark.parametrize(("stage", "held"), [(0, 21), (1, 21), (2, 21), (3, 5 + 7 + 4)])
def test_parameters_are_sharded_at_stage_3_but_for_the_small_ones(stage: int, held: int) -> None:
    assert held_parameters(PARAMETERS, replace(STAGE_3, stage=stage), 2) == held
    assert persistent_shards(PARAMETERS, replace(STAGE_3, stage=stage), 2) == (4 + 2 if stage == 3 else 0)


@pytest.mark.parametrize(
    ("stage", "element", "gradients", "optimizer"),
    [
        (0, 2, 11 * 2, 11 * 12),
        (0, 4, 11 * 4, 11 * 8),
        (1, 2, 11 * 2, 6 * 12),
        (2, 2, 6 * 4, 6 * 12),
        (2, 4, 6 * 4, 6 * 12),
        (3, 2, 6 * 4, 6 * 12),
        (3, 4, 6 * 4, 6 * 8),
    ],
)
def test_gradients_and_optimizer_state_of_what_trains(stage: int, element: int, gradients: int, optimizer: int) -> None:
    """11 of 21 elements train, 6 a worker: moments of 8 bytes, and 4 for the float32 copy if there is one."""
    value = setup(zero=replace(STAGE_3, stage=stage), element=element)
    assert (gradient_bytes(value), optimizer_bytes(value)) == (gradients, optimizer)


def test_soft_prompts_sum_the_gradients_of_two_objectives() -> None:
    assert gradient_bytes(setup(rank=0, soft_prompt=True)) - gradient_bytes(setup()) == 2 * 4 * 11


def test_what_stays_gathered_until_the_backward_pass() -> None:
    sizes = [4, 3, 2, 1]
    assert kept_elements(sizes, replace(STAGE_3, reuse=7), tied=False) == 6  # 2 * (2 + 1) < 7 elements follow 3, and 12 follow 4
    assert kept_elements(sizes, replace(STAGE_3, reuse=100), tied=False) == 10
    assert kept_elements([], STAGE_3, tied=False) == 0
    assert kept_elements([5, 2, 5], STAGE_3, tied=True) == 7  # the tied embedding is held once


def test_most_gathered_at_once() -> None:
    parameters = replace(PARAMETERS, sizes=(40, 30, 20, 10, 7), trains=(False,) * 5)
    assert gathered_sizes(parameters, STAGE_3) == [40, 30, 20, 10]
    assert live_elements(parameters, replace(STAGE_3, reuse=70)) == 60 + 5
    assert live_elements(parameters, replace(STAGE_3, reuse=1)) == 40 + 5
    assert live_elements(parameters, replace(STAGE_3, reuse=1000)) == 100
    assert live_elements(parameters, replace(STAGE_3, stage=2)) == 0
    tied = replace(parameters, tied=True, head=40)
    assert gathered_sizes(tied, STAGE_3) == [40, 30, 20, 10, 40]
    assert live_elements(tied, replace(STAGE_3, reuse=1000)) == 100


def test_a_layer_by_hand() -> None:
    """h = 8, i = 16, q = 8, k = 4, b = 2, T = 256; 7 modules a layer have an adapter of rank 2."""
    norms, attention, mlp, adapter = 2 * (6 * 8 + 4), 2 * (2 * 8 + 2 * 4) + 4 * 2, 4 * 2 * 16, 2 * 2 * 7
    assert layer_bytes(setup()) == 256 * (norms + attention + mlp + adapter) == 256 * 316
    dense = 2 * (2 * 8 + 2 * 8) + 4 * 2 + 2 * 256
    assert layer_bytes(setup(attention="sdpa")) == 256 * (norms + dense + mlp + adapter)
    assert layer_bytes(setup(rank=0, soft_prompt=True)) == 256 * (2 * (4 * 8 + 4) + attention + 3 * 2 * 16)
    assert layer_bytes(setup(rank=0)) == 256 * (norms + attention + mlp + 2 * 2 * 8)


def test_checkpointing_keeps_the_input_of_each_layer_and_one_layer() -> None:
    last_norm = 256 * 6 * 8
    assert activation_bytes(setup()) == 2 * 256 * 316 + last_norm
    assert activation_bytes(setup(checkpointing=True)) == 2 * 256 * 8 * 2 + 256 * 316 + last_norm


def saved_bytes(layers: int, batch: PackedBatch, dtype: torch.dtype, *, rank: int, attention: str, num_virtual: int = 0) -> int:
    """Bytes of all distinct tensors that autograd keeps in a forward pass, without weights.

    num_virtual: the number of vectors, if only they train.
    """
    register()
    config = transformers.LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        attn_implementation={"sdpa": "sdpa", "per_prompt": PER_PROMPT}[attention],
    )
    model: Any = transformers.LlamaForCausalLM(config).to(dtype)
    base = model
    if num_virtual:
        embedding = add_soft_prompt(model, torch.zeros(num_virtual, 64))
        model.requires_grad_(False)
        embedding.prompt.requires_grad_(True)
    if rank:
        model = add_lora(model, LoraSpec(rank, 8.0, 0.0, "all-linear"), seed=0, weights=None, keep_reference=False)
        base = model.get_base_model()
    weights = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: list[torch.Tensor] = []  # keeps tensors alive, so that no storage is used twice

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept.append(tensor)
        return tensor

    ids, positions = batch.input_ids[None] % (64 + num_virtual), batch.positions[None]
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        mask = masks_for(batch, config, dtype)
        base.base_model(input_ids=ids, position_ids=positions, attention_mask=mask, use_cache=False)
    storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in kept}
    return sum(size for place, size in storages.items() if place not in weights)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rank", "num_virtual"), [(0, 0), (4, 0), (0, 5)], ids=["full", "adapter", "soft prompt"])
@pytest.mark.parametrize("attention", ["sdpa", "per_prompt"])
def test_a_layer_is_what_autograd_saves(dtype: torch.dtype, rank: int, num_virtual: int, attention: str) -> None:
    rng = np.random.default_rng(0)
    batch = pack_prompts([random_tree(rng, vocab_size=61, prompt=prompt, groups=2).grouped_prompt() for prompt in (40, 30)])
    by_layers = [saved_bytes(layers, batch, dtype, rank=rank, attention=attention, num_virtual=num_virtual) for layers in (3, 2)]
    measured, rows = by_layers[0] - by_layers[1], batch.num_tokens
    shape = Architecture(width=64, inner=160, layers=3, heads=4, kv_heads=2, head_dim=16, vocabulary=64, max_positions=None)
    parameters = replace(PARAMETERS, adapted=21)
    value = setup(
        shape=shape,
        parameters=parameters,
        element=dtype.itemsize,
        attention=attention,
        rank=rank,
        max_tokens=rows,
        on_gpu=False,
        soft_prompt=num_virtual > 0,
    )
    assert layer_bytes(value) == measured


@pytest.mark.parametrize("attention", ["flex", "per_prompt", "sdpa"])
@pytest.mark.parametrize("checkpointing", [True, False])
@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_more_tokens_need_more_and_more_workers_never_do(attention: str, checkpointing: bool, stage: int) -> None:
    zero = STAGE_3 if stage == 3 else Zero(stage, bucket=50 if stage else 0)
    base = setup(attention=attention, checkpointing=checkpointing, zero=zero)
    needs = [total(replace(base, max_tokens=tokens)) for tokens in (256, 512, 1024, 4096)]
    assert needs == sorted(set(needs))
    by_workers = [total(replace(base, workers=workers)) for workers in (1, 2, 8, 64)]
    assert by_workers == sorted(by_workers, reverse=True)
    if stage:
        assert by_workers[-1] < by_workers[0]


def test_the_parts_add_up() -> None:
    parts = memory(setup(), reserved=7.0, margin=0.1)
    rest = sum(size for name, size in parts.items() if name not in ("fragmentation", "reserved"))
    assert parts["fragmentation"] == pytest.approx(0.1 * rest)
    assert parts["reserved"] == 7.0
    assert all(size >= 0 for size in parts.values())


def test_one_worker_gathers_nothing() -> None:
    assert memory(setup(workers=1), reserved=0.0, margin=0.0)["gathered layers"] == 0
    assert memory(setup(workers=2), reserved=0.0, margin=0.0)["gathered layers"] == 2 * 10


def test_on_a_cpu_a_bucket_is_as_large_as_what_trains_and_chunks_as_all_logits() -> None:
    """11 elements train in a bucket of 50; 256 rows of 50 logits, three times in plain PyTorch, and the hidden rows' gradient."""
    on_cpu = memory(setup(on_gpu=False, attention="per_prompt", element=4), reserved=0.0, margin=0.0)
    assert on_cpu["gradient bucket"] == 4 * 11
    assert on_cpu["head"] == 3 * 256 * 50 * 4 + 256 * 8 * 4
    assert memory(setup(), reserved=0.0, margin=0.0)["gradient bucket"] == 2 * 50


@pytest.mark.parametrize(
    ("vocabulary", "element", "rows"),
    [(128_256, 2, 4096), (152_064, 4, 3456), (50, 2, 4096)],  # 3,456: the multiple of 128 whose float32 logits are under 2 GiB
)
def test_on_a_gpu_a_chunk_of_logits_has_4096_rows_or_2_gib(vocabulary: int, element: int, rows: int) -> None:
    value = setup(shape=replace(SHAPE, vocabulary=vocabulary), element=element, max_tokens=8192)
    assert memory(value, reserved=0.0, margin=0.0)["head"] == rows * vocabulary * element + 8192 * 8 * element
    short = memory(replace(value, max_tokens=1024), reserved=0.0, margin=0.0)
    assert short["head"] == 1024 * (vocabulary + 8) * element
