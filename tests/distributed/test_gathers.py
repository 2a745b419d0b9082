"""ZeRO-3 gathers a layer once a step: what the forward pass gathered stays for the backward pass, also after scoring passes.

With a small cluster.max_live_parameters nothing stays. An online reference costs one forward pass more, and no more than that.
"""

from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from worker_processes import run_workers

from rec_dist.packing.grouped_prompt import GroupedPrompt


def _held(world: Any, job: tuple[str, int]) -> dict[str, Any]:
    """Bytes of parameters held before and after the forward pass of each of four training steps.

    The steps follow scoring passes, twice.
    """
    from rec_dist.engine import process_group

    with process_group.joined(world):
        return _held_by(*job)


def _held_by(folder: str, live: int) -> dict[str, Any]:
    import torch

    from rec_dist.engine.engine import Engine, sharded_loading
    from rec_dist.engine.settings import EngineSettings
    from rec_dist.methods.preference import sft
    from rec_dist.models.language import load_language_model
    from rec_dist.models.scorer import Scorer
    from rec_dist.packing.packed_batch import pack_prompts

    settings = EngineSettings(zero_stage=3, bf16=False, max_grad_norm=0.0, hidden_size=32, max_live_parameters=live)
    with sharded_loading(settings):
        method = sft()
        module = Scorer(load_language_model(Path(folder), dtype=torch.float32), method.loss, method.metric_names)
    engine = Engine(module, settings, device="cpu", optimizer=torch.optim.AdamW(module.parameters(), lr=1e-3))
    batch = pack_prompts([_prompt()])
    engine.train_mode(False)
    for _ in range(4):
        engine.score(batch)
    engine.train_mode(True)
    held = []
    for step in range(8):
        if step == 4:  # a validation
            engine.train_mode(False)
            engine.score(batch)
            engine.score(batch)
            engine.train_mode(True)
        before, whole = engine.local_parameter_bytes()
        loss = engine.forward(batch)[0]
        after, _ = engine.local_parameter_bytes()
        engine.backward(loss, last=True)
        engine.step(1e-3)
        held.append((before, after, whole))
    return {"held": held}


def _prompt() -> GroupedPrompt:
    tokens = np.arange(3, 15, dtype=np.int32)
    return GroupedPrompt(
        tokens=tokens,
        branch_points=np.asarray([11], dtype=np.int32),
        keys=np.zeros(1, dtype=np.int64),
        group_sizes=np.asarray([1], dtype=np.int32),
        completion_inputs=np.asarray([5, 6], dtype=np.int32),
        input_lengths=np.asarray([2], dtype=np.int32),
        lengths=np.asarray([3], dtype=np.int32),
        targets=np.asarray([5, 6, 7], dtype=np.int32),
    )


@pytest.mark.parametrize(("live", "kept"), [(1_000_000_000, True), (1, False)])
def test_training_after_scoring_keeps_what_it_gathered_until_the_backward_pass(
    tiny_model_dir: Path, tmp_path: Path, live: int, kept: bool
) -> None:
    for result in run_workers(_held, [(str(tiny_model_dir), live)] * 2, tmp_path):
        for before, after, whole in (result["held"][3], result["held"][7]):
            assert before < 0.7 * whole
            assert after >= 0.95 * whole if kept else after < 0.8 * whole


_LAYERS = 6


def _counted(world: Any, job: tuple[str, int, bool]) -> list[dict[str, int]]:
    """What ZeRO-3 gathered in each of the last three of six micro-batches, which train an adapter on six layers.

    job: (a model's folder, cluster.max_live_parameters, whether an online reference is scored before each micro-batch).
    """
    from rec_dist.engine import process_group

    with process_group.joined(world):
        return _count(*job)


def _count(folder: str, live: int, online: bool) -> list[dict[str, int]]:
    import torch

    from rec_dist.engine.engine import Engine, sharded_loading
    from rec_dist.engine.settings import EngineSettings
    from rec_dist.methods.preference import sft
    from rec_dist.models.language import LoraSpec, add_lora, load_language_model
    from rec_dist.models.scorer import Scorer
    from rec_dist.packing.packed_batch import pack_prompts
    from rec_dist.training.reference import NoReference, OnlineReference

    settings = EngineSettings(3, bf16=False, max_grad_norm=0.0, hidden_size=32, max_live_parameters=live, workers=2)
    with sharded_loading(settings):
        method = sft()
        model = load_language_model(Path(folder), dtype=torch.float32)
        model = add_lora(model, LoraSpec(4, 8.0, 0.0, "all-linear"), seed=0, weights=None, keep_reference=False)
        module = Scorer(model, method.loss, method.metric_names)
    trains = [parameter for parameter in module.parameters() if parameter.requires_grad]
    engine = Engine(module, settings, device="cpu", optimizer=torch.optim.AdamW(trains, lr=1e-3))
    batch = pack_prompts([_prompt()])
    engine.train_mode(False)
    engine.score(batch)
    engine.score(batch)
    engine.train_mode(True)
    reference = OnlineReference(engine, "cpu") if online else NoReference()
    gathered = _gathers_of(engine)
    rows = []
    for _ in range(6):
        gathered.clear()
        loss = engine.forward(reference.attach(batch))[0]
        engine.backward(loss, last=True)
        engine.step(1e-3)
        rows.append(dict(gathered))
    return rows[3:]


def _gathers_of(engine: Any) -> Counter[str]:
    """Counts calls that gather, and the elements that they gather, from now on."""
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    counted: Counter[str] = Counter()
    name = "_PartitionedParameterCoordinator__all_gather_params_"
    gather = getattr(PartitionedParameterCoordinator, name)

    def counting(self: Any, params: Any, forward: bool, quantize: bool = False) -> None:
        absent = [parameter.ds_numel for parameter in params if parameter.ds_status.name == "NOT_AVAILABLE"]
        counted["calls"] += bool(absent)
        counted["elements"] += sum(absent)
        gather(self, params, forward, quantize)

    setattr(PartitionedParameterCoordinator, name, counting)
    return counted


@pytest.fixture(scope="module")
def six_layers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama of six layers of width 32, without a tokenizer."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("six-layers")
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "vocab_size": 64, "head_dim": 8}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(num_hidden_layers=_LAYERS, **sizes)).save_pretrained(folder)
    return folder


@pytest.mark.parametrize(("live", "kept"), [(1_000_000_000, _LAYERS), pytest.param(20_000, 2, marks=pytest.mark.slow)])
def test_an_online_reference_gathers_one_forward_pass_more(six_layers: Path, tmp_path: Path, live: int, kept: int) -> None:
    """A layer has 4 * 32 * 32 + 3 * 32 * 64 sharded elements, and embeddings and head 64 * 32 each; the adapter is small.

    The head and the last `kept` layers stay gathered for the backward pass. With 20,000 live elements these are two layers:
    head and layer, the adapter included, have 14,560.
    """
    layer, outside = 10_240, 2_048
    expected = outside + _LAYERS * layer + outside + (_LAYERS - kept) * layer  # forward, and what is missing backward
    again = outside + (_LAYERS - kept) * layer  # the reference pass leaves head and kept layers for the forward pass
    calls = {}
    for online in (False, True):
        ranks = run_workers(_counted, [(str(six_layers), live, online)] * 2, tmp_path / str(online))
        rows = [row for rank in ranks for row in rank]
        assert {row["elements"] for row in rows} == {expected + again * online}
        calls[online] = max(row["calls"] for row in rows)
    assert calls[True] <= calls[False] + _LAYERS + 2
