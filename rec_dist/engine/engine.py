"""The engine: a module, an optimizer and ZeRO behind a few calls: forward, backward, step, score, and its state.

Only this package imports deepspeed. A loss comes in as a sum that is scaled to the global mean already. DeepSpeed
averages gradients over ranks, so the caller multiplies the loss by the world size (training/loop.py does).
"""

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from rec_dist.checkpoint.state_files import StateWriter
from rec_dist.engine import whole_state
from rec_dist.engine.settings import EngineSettings, deepspeed_config
from rec_dist.models.layers import decoder_layers, require_gradients_of_inputs


@contextmanager
def sharded_loading(settings: EngineSettings) -> Iterator[None]:
    """Inside, from_pretrained loads straight into ZeRO-3 shards; otherwise every rank would hold the whole model in memory."""
    if settings.zero_stage != 3:
        yield
        return
    from transformers.integrations.deepspeed import HfDeepSpeedConfig, unset_hf_deepspeed_config

    # While it loads, DeepSpeed casts every weight to the dtype of its configuration.
    keep_alive = HfDeepSpeedConfig(deepspeed_config(replace(settings, bf16=settings.loads_bf16)))
    try:
        yield
    finally:
        unset_hf_deepspeed_config()
        del keep_alive


class Engine:
    """Trains or scores `module`. module.forward(batch) -> (loss_sum, sums, logps).

    ZeRO-3 gathers a decoder layer as a whole ("leaf module"): one hook in place of forty, of which each costs the host about
    0.3 ms. And since the layer's own modules are not in DeepSpeed's trace, a pass with another adapter keeps the trace.
    """

    def __init__(
        self,
        module: nn.Module,
        settings: EngineSettings,
        *,
        device: str,
        optimizer: torch.optim.Optimizer | None,
    ) -> None:
        import deepspeed

        self._settings = settings
        self._device = device
        self._optimizer = optimizer
        self._has_trained = False
        config = deepspeed_config(settings)
        if optimizer is None:
            config["gradient_clipping"] = 0.0
            if settings.zero_stage != 3:  # told of bfloat16, DeepSpeed would make a float32 copy of what trains, for no optimizer
                config |= {"zero_optimization": {"stage": 0}, "bf16": {"enabled": False}}
        layers = decoder_layers(module) if settings.zero_stage == 3 else []
        for layer in layers:
            deepspeed.utils.set_z3_leaf_module(layer, True)
        self._engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        if layers and optimizer is not None:
            # A layer's gradients are reduced when that of its input is there. Only now: DeepSpeed's hook on the embedding, which
            # then comes first, would otherwise gather the embedding for a backward pass that it does not have.
            require_gradients_of_inputs(module)

    @property
    def zero_stage(self) -> int:
        """The ZeRO stage, 0 to 3."""
        return self._settings.zero_stage

    @property
    def module(self) -> nn.Module:
        """The module as given, its parameters now DeepSpeed's to place."""
        module: nn.Module = self._engine.module
        return module

    def train_mode(self, on: bool) -> None:
        """Switch dropout on or off. The first switch to training also drops what ZeRO-3 planned for scoring."""
        if on and not self._has_trained:
            self._has_trained = True
            if self._settings.zero_stage == 3:
                _forget_trace(self._engine)
        self._engine.train(on)

    def forward(self, batch: Any) -> Any:
        """Run one forward pass with a graph."""
        return self._engine(batch.to(self._device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        """Run one backward pass; the `last` of a step's micro-batches ends the accumulation."""
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def step(self, lr: float, *, discard: bool = False) -> float:
        """Clip, step with learning rate `lr`, and clear the gradients. Returns the global gradient norm before clipping.

        When that norm is not finite, or with `discard` (given on all ranks alike), weights and optimizer stay as they
        are on every rank, and the returned norm is not finite.
        """
        assert self._optimizer is not None
        for group in self._engine.optimizer.param_groups:
            group["lr"] = lr
        own = self._plain_grad_norm()
        if self._settings.zero_stage == 0 and (discard or not math.isfinite(own)):  # DeepSpeed would apply it in float32
            self._engine.zero_grad()
            return float("nan") if discard else own
        if (
            discard
        ):  # DeepSpeed itself leaves out a step whose gradients are not finite and clears all it must, so we make them so
            for gradients in self._engine.optimizer.averaged_gradients.values():
                for gradient in gradients or ():
                    gradient.fill_(float("nan"))
        self._engine.step()
        norm = self._engine.get_global_grad_norm()
        return float(own if norm is None else norm)

    def _plain_grad_norm(self) -> float:
        """The norm of gradients in .grad, already averaged over ranks: for stage 0 in float32, where DeepSpeed keeps no norm."""
        if self._settings.zero_stage != 0:
            return float("nan")
        gradients = [p.grad for p in self.module.parameters() if p.grad is not None and p.grad.numel()]
        return float(torch.nn.utils.get_total_norm(gradients))

    @torch.no_grad()
    def score(self, batch: Any) -> Any:
        """Run one forward pass without a graph."""
        result = self._engine(batch.to(self._device))
        if self._has_trained and self._settings.zero_stage == 3:
            _forget_recording(self._engine)
        return result

    def num_state_bytes(self) -> int:
        """Bytes that save_state writes, over all ranks: 12 for each weight that trains."""
        return sum(entry.num_bytes for entry in whole_state.entries_of(self.module))

    def save_state(self, folder: Path, *, asynchronous: bool) -> StateWriter:
        """Begin to write the trainable weights and the optimizer's state into `folder`. A collective; the writer's calls are not.

        With `asynchronous` the next step may begin when this returns, otherwise only after the writer's finish().
        """
        rank, size = self._engine.global_rank, self._engine.world_size
        return whole_state.save(
            self._engine, self._settings.zero_stage, folder, rank=rank, world_size=size, asynchronous=asynchronous
        )

    def load_state(self, folder: Path) -> None:
        """Read what save_state wrote, at any world size and ZeRO stage. A collective."""
        whole_state.load(self._engine, self._settings.zero_stage, folder)

    def trainable_weights(self) -> dict[str, Tensor]:
        """name -> whole weight on the CPU, for parameters that train; empty on ranks other than 0 under ZeRO-3. A collective."""
        if self._settings.zero_stage == 3:
            state = self._engine._zero3_consolidated_16bit_state_dict(exclude_frozen_parameters=True) or {}
        else:
            state = {name: value for name, value in self.module.named_parameters() if value.requires_grad}
        return {name: value.detach().to("cpu", copy=True).contiguous() for name, value in state.items()}

    def local_parameter_bytes(self) -> tuple[int, int]:
        """(bytes of parameters this rank holds now, bytes of the whole module); under ZeRO-3 about 1/world of it."""
        local = whole = 0
        for parameter in self.module.parameters():
            shard = getattr(parameter, "ds_tensor", None)
            local += parameter.numel() * parameter.element_size()
            if shard is not None and parameter.numel() == 0:
                local += shard.numel() * shard.element_size()
            whole += int(getattr(parameter, "ds_numel", parameter.numel())) * parameter.element_size()
        return local, whole


def _forget_recording(engine: Any) -> None:
    """Drop the order of modules that DeepSpeed has just recorded, if the pass was the one that it records.

    It records the first pass after a trace became invalid. Were that a scoring pass, such as an online reference's, the backward
    pass of the next training pass would not be in the trace and invalidate it again, at every micro-batch.
    """
    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if coordinator.is_record_trace():
        coordinator._invalidate_trace()


def _forget_trace(engine: Any) -> None:
    """Drop what DeepSpeed learned from scoring passes: the order of modules, and where it may free which parameters.

    DeepSpeed keeps the latter for ever, even when the order changes. A scoring pass has no backward pass, so training
    after it would free every parameter after the forward pass and gather it a second time, one by one (measured: 298
    gathers a step instead of 3).
    """
    from deepspeed.runtime.zero.partitioned_param_coordinator import PartitionedParameterCoordinator

    coordinator = engine.optimizer.parameter_offload.get_param_coordinator()
    if not coordinator.is_invalid_trace():
        coordinator._invalidate_trace()
    memo = PartitionedParameterCoordinator._PartitionedParameterCoordinator__params_to_release
    for cell in memo.__closure__ or ():  # DeepSpeed wraps the memo in a function of its own
        if hasattr(cell.cell_contents, "cache_clear"):
            cell.cell_contents.cache_clear()
