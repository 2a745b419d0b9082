"""What trains, free of topology: every trainable weight in float32 with its Adam state, whole, in one safetensors file.

Any number of workers at any ZeRO stage can read it. Gathered tensor by tensor to rank 0's host memory, 12 bytes a trainable weight:
a LoRA of rank 8 on 8B parameters is 21M weights, 250 MB. Frozen weights are not in it.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

FILE_NAME = "state.safetensors"
MAX_WEIGHTS = 1_000_000_000  # 12 GB on rank 0; what trains more keeps DeepSpeed's shards, which all ranks write at once
_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT, _STEP = "weight", "step"


def num_trainable(module: nn.Module) -> int:
    """Weights that train, of all ranks together."""
    return sum(int(getattr(p, "ds_numel", p.numel())) for p in module.parameters() if p.requires_grad)


def save(engine: Any, stage: int, path: Path, *, is_main: bool) -> None:
    """Rank 0 writes `path`. engine: DeepSpeed's. A collective at stages 1 to 3."""
    if stage == 0 and not is_main:
        return
    state = _State(engine, stage)
    tensors: dict[str, Tensor] = {}
    for name, parameter in state.parameters():
        for kind in (_WEIGHT, *_MOMENTS):
            whole = state.read(parameter, kind)
            if is_main:
                tensors[f"{kind}.{name}"] = whole.detach().to("cpu", torch.float32, copy=True).contiguous()
    if is_main:
        tensors[_STEP] = torch.tensor(state.num_steps())
        save_file(tensors, path)


@torch.no_grad()
def load(engine: Any, stage: int, path: Path) -> None:
    """Puts what `save` wrote into an engine that trains the same parameters. A collective at stage 3."""
    state = _State(engine, stage)
    with safe_open(path, framework="pt") as file:
        names = {f"{kind}.{name}" for name, _ in state.parameters() for kind in (_WEIGHT, *_MOMENTS)}
        assert names | {_STEP} == set(file.keys()), f"{path} holds other parameters than those that train"
        for name, parameter in state.parameters():
            for kind in (_WEIGHT, *_MOMENTS):
                state.write(parameter, kind, file.get_tensor(f"{kind}.{name}"))
        state.settle(float(file.get_tensor(_STEP)))


class _State:
    """Weights and Adam state behind DeepSpeed's wrappers (0.19.8), which differ from stage to stage.

    0: torch's optimizer on the parameters (float32), or on float32 copies of them one by one (bfloat16). 1, 2: on this rank's
    part of one flat float32 copy. 3: on this rank's part of every parameter, laid end to end.
    """

    def __init__(self, engine: Any, stage: int) -> None:
        self._module, self._outer, self._inner, self._stage = engine.module, engine.optimizer, engine.basic_optimizer, stage
        if stage == 3:
            self._stepped = list(self._outer.fp32_partitioned_groups_flat)
        elif stage:
            self._stepped = list(self._outer.single_partition_of_fp32_groups)
        else:
            groups = getattr(self._outer, "fp32_groups", None) or [group["params"] for group in self._outer.param_groups]
            self._stepped = [tensor for group in groups for tensor in group]
            own = [p for group in getattr(self._outer, "fp16_groups", groups) for p in group]
            self._copies = {id(parameter): copy for parameter, copy in zip(own, self._stepped, strict=True)}
        for tensor in self._stepped:  # as torch's AdamW makes it in its first step, which may not have come yet
            state = self._inner.state[tensor]
            if not state:
                state[_STEP] = torch.zeros((), dtype=torch.float32)
                state.update({key: torch.zeros_like(tensor) for key in _MOMENTS})
        if stage in (1, 2):
            self._outer._lazy_init_hp_params_optimizer_state()

    def parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """(name, parameter) of what trains, in the same order on every rank."""
        return ((name, p) for name, p in self._module.named_parameters() if p.requires_grad)

    def num_steps(self) -> float:
        """Steps that Adam has made; the same for all parameters."""
        return float(self._inner.state[self._stepped[0]][_STEP])

    def read(self, parameter: nn.Parameter, kind: str) -> Tensor:
        """The whole weight or moment, float32. A collective at stages 1 to 3."""
        from deepspeed.utils import safe_get_full_fp32_param, safe_get_full_optimizer_state

        if self._stage == 0:
            copy = self._copies[id(parameter)]
            return copy if kind == _WEIGHT else self._inner.state[copy][kind]  # type: ignore[no-any-return]
        whole = safe_get_full_fp32_param(parameter) if kind == _WEIGHT else safe_get_full_optimizer_state(parameter, kind)
        assert whole is not None
        return whole  # type: ignore[no-any-return]

    def write(self, parameter: nn.Parameter, kind: str, whole: Tensor) -> None:
        """Puts this rank's part of `whole` where the optimizer steps, and into the parameter."""
        from deepspeed import utils

        if self._stage == 3:
            # Not safe_set_full_*: it slices the last rank's part without the padding that parts of uneven parameters have.
            size = parameter.ds_tensor.numel()  # type: ignore[attr-defined]
            part = whole.flatten()[torch.distributed.get_rank() * size :][:size]
            part = torch.nn.functional.pad(part, (0, size - part.numel()))
            if kind == _WEIGHT:
                utils.safe_set_local_fp32_param(parameter, part)
            else:
                utils.safe_set_local_optimizer_state(parameter, part, kind)
            return
        if self._stage == 0:
            copy = self._copies[id(parameter)]
            (copy if kind == _WEIGHT else self._inner.state[copy][kind]).copy_(whole)
        elif kind == _WEIGHT:
            utils.safe_set_full_fp32_param(parameter, whole)
        else:
            utils.safe_set_full_optimizer_state(parameter, whole, kind)
        if kind == _WEIGHT:
            parameter.copy_(whole)

    def settle(self, num_steps: float) -> None:
        """After all writes: Adam's step count, and under ZeRO-3 the parameters from what was written. A collective at stage 3."""
        for tensor in self._stepped:
            self._inner.state[tensor][_STEP].fill_(num_steps)
        if self._stage == 3:
            self._outer.checkpoint_event_prologue()
            for number in range(len(self._stepped)):
                self._outer._reassign_or_swap_out_partitioned_parameters(number)
            self._outer.checkpoint_event_epilogue()
