"""The advice after memory has run out: numbers worked out by hand, and only what can help."""

from dataclasses import replace

import pytest
import torch

from rec_dist.config.schema import RunConfig
from rec_dist.errors import OutOfMemoryError
from rec_dist.runtime.world import World
from rec_dist.sizing.device import total_bytes
from rec_dist.training.memory import (
    MemoryWatch,
    Shortage,
    advice,
    advising,
    in_use_bytes,
    is_shortage,
    peak_bytes,
    smaller_micro_batch,
)

GB = 10**9
SHORT = Shortage(
    device="cuda:0",
    peak=79 * GB,
    total=80 * GB,
    static=20 * GB,
    bytes_per_token=6e6,
    max_tokens=16384,
    activation_checkpointing=False,
    zero_stage=2,
    world_size=8,
    trains_adapter=True,
)


def test_the_next_micro_batch_is_what_fits_into_nine_tenths_of_the_room() -> None:
    assert smaller_micro_batch(16384, bytes_per_token=6e6, room_bytes=60e9) == 8960  # 9000 in whole blocks of 128
    assert smaller_micro_batch(16384, bytes_per_token=1e6, room_bytes=60e9) == 14720  # it did not fit, so never more than 90 %
    assert smaller_micro_batch(16384, bytes_per_token=None, room_bytes=60e9) == 8192
    assert smaller_micro_batch(100, bytes_per_token=None, room_bytes=0) == 50
    assert smaller_micro_batch(1024, bytes_per_token=1e6, room_bytes=1e6) == 8


def test_everything_that_may_help_is_named_with_numbers() -> None:
    text = advice(SHORT)
    assert text.startswith("out of memory on cuda:0 (peak 79.0 of 80.0 GB, 20.0 GB of it before the first micro-batch)")
    assert "train.max_tokens_per_micro_batch from 16384 to 8960 (estimated from 6 MB of activations a token)" in text
    assert "model.activation_checkpointing=true" in text
    assert "cluster.zero_stage from 2 to 3 (weights shared out over 8 workers)" in text
    assert "adapter.kind=lora" not in text and "\n" not in text


def test_what_is_on_already_or_cannot_help_is_not_named() -> None:
    text = advice(replace(SHORT, activation_checkpointing=True, zero_stage=3, trains_adapter=False))
    assert "activation_checkpointing" not in text and "zero_stage from" not in text
    assert "cluster.num_workers" in text and "adapter.kind=lora" in text
    before = advice(replace(SHORT, static=None))
    assert "before the first micro-batch" in before and "max_tokens_per_micro_batch" not in before  # the weights alone do not fit
    assert "(half, since" in advice(replace(SHORT, bytes_per_token=None))


def test_what_counts_as_running_out() -> None:
    assert is_shortage(MemoryError()) and is_shortage(torch.OutOfMemoryError("CUDA out of memory"))
    assert is_shortage(RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes"))
    assert not is_shortage(RuntimeError("CUDA error")) and not is_shortage(ValueError("can't allocate memory"))


def config() -> RunConfig:
    return RunConfig.model_validate({"data": {"source": "a", "path": "b"}, "train": {"run_dir": "c"}})


def test_the_fault_is_replaced_and_others_pass() -> None:
    with pytest.raises(OutOfMemoryError, match="out of memory on cpu") as raised, advising(config(), World()):
        raise MemoryError
    assert isinstance(raised.value.__cause__, MemoryError)
    with pytest.raises(KeyError), advising(config(), World()):
        raise KeyError


def test_a_real_allocation_that_fails() -> None:
    with pytest.raises(OutOfMemoryError, match="before the first micro-batch"), advising(config(), World()):
        torch.empty(1 << 60, dtype=torch.uint8)


def test_a_token_is_measured_from_micro_batches_that_went_through() -> None:
    watch = MemoryWatch("cpu")
    watch.next_micro_batch(100)
    assert watch.bytes_per_token is None
    watch = MemoryWatch("cpu")
    watch.start()
    assert watch.static_bytes is not None
    watch.next_micro_batch(100)
    assert watch.bytes_per_token is None  # no micro-batch has gone through yet
    watch.next_micro_batch(40)
    assert watch.bytes_per_token == pytest.approx((peak_bytes("cpu") - watch.static_bytes) / 100, rel=0.5, abs=1e5)
    assert 0 < in_use_bytes("cpu") <= peak_bytes("cpu") * 1.01 < total_bytes("cpu")
