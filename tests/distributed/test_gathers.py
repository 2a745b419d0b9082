"""ZeRO-3 gathers a layer once a step: what the forward pass gathered stays for the backward pass, also after scoring passes.

With a small cluster.max_live_parameters nothing stays.
"""

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
