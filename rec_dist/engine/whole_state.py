"""The state of training, free of topology: every trainable weight in float32 with its Adam state, whole, in safetensors files.

Any number of workers at any ZeRO stage can read it. It is gathered tensor by tensor and takes 12 bytes for each
trainable weight: a LoRA of rank 8 on 8B parameters is 21M weights, 250 MB in one file; 8B weights that train are 96 GB
in files that all ranks write. Frozen weights are not in it, nor a schedule or a generator, since both are functions of
the step. The buffers that a module names in its attribute `changing_buffers` are: what a step leaves for the next,
float32, the same on all ranks.
"""

from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from rec_dist.checkpoint import state_files
from rec_dist.checkpoint.state_files import Entry, StateWriter

_MOMENTS = ("exp_avg", "exp_avg_sq")
_WEIGHT, _STEP, _BUFFER = "weight", "step", "buffer"


def entries_of(module: nn.Module) -> list[Entry]:
    """List the tensors of the state: Adam's step count, then weight and moments of each parameter that trains, then buffers."""
    named = [(name, tuple(getattr(p, "ds_shape", p.shape))) for name, p in module.named_parameters() if p.requires_grad]
    buffers = [Entry(f"{_BUFFER}.{name}", tuple(getattr(owner, own).shape)) for name, owner, own in _changing(module)]
    return [
        Entry(_STEP, ()),
        *(Entry(f"{kind}.{name}", shape) for name, shape in named for kind in (_WEIGHT, *_MOMENTS)),
        *buffers,
    ]


def save(engine: Any, stage: int, folder: Path, *, rank: int, world_size: int, asynchronous: bool) -> StateWriter:
    """Give every tensor to the rank that writes it. engine: DeepSpeed's. A collective at stages 1 to 3.

    With `asynchronous` the state may change when this returns, otherwise only after the writer's finish().
    """
    state = _State(engine, stage)
    files = state_files.lay_out(entries_of(engine.module), state_files.MAX_FILE_BYTES)
    writer = StateWriter(folder, files[rank::world_size], asynchronous=asynchronous)
    parameters = dict(state.parameters())
    buffers = {name: getattr(owner, own) for name, owner, own in _changing(engine.module)}
    for owner, entry in state_files.in_turn(files, world_size):
        kind, _, name = entry.name.partition(".")
        if entry.name == _STEP:
            whole = torch.tensor(state.num_steps())
        elif kind == _BUFFER:
            whole = buffers[name]
        elif stage == 0 and owner != rank:
            continue
        else:
            whole = state.read(parameters[name], kind)
        if owner == rank:
            writer.put(whole)
    return writer


@torch.no_grad()
def load(engine: Any, stage: int, folder: Path) -> None:
    """Put what `save` wrote into an engine that trains the same parameters, one tensor at a time. A collective at stage 3."""
    state = _State(engine, stage)
    with ExitStack() as stack:
        paths = sorted(folder.glob(state_files.PATTERN))
        files = [stack.enter_context(safe_open(path, framework="pt")) for path in paths]
        place = {name: file for file in files for name in file.keys()}  # noqa: SIM118 - a safetensors file is no mapping
        assert place.keys() == {entry.name for entry in entries_of(engine.module)}, f"{folder} holds other parameters"
        for name, parameter in state.parameters():
            for kind in (_WEIGHT, *_MOMENTS):
                state.write(parameter, kind, place[f"{kind}.{name}"].get_tensor(f"{kind}.{name}"))
        for name, owner, own in _changing(engine.module):  # replaced: DeepSpeed has made them bfloat16
            value = place[f"{_BUFFER}.{name}"].get_tensor(f"{_BUFFER}.{name}")
            setattr(owner, own, value.to(getattr(owner, own).device))
        state.settle(float(place[_STEP].get_tensor(_STEP)))


def _changing(module: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """(full name, owner, own name) of the buffers that change while training."""
    return [
        (f"{prefix}.{own}", owner, own)
        for prefix, owner in module.named_modules()
        for own in getattr(owner, "changing_buffers", ())
    ]


class _State:
    """Weights and Adam state behind DeepSpeed's wrappers (0.19.8), which differ from stage to stage.

    0: torch's optimizer on the parameters (float32), or on float32 copies of them one by one (bfloat16). 1, 2: on this
    rank's part of one flat float32 copy. 3: on this rank's part of every parameter, laid end to end.
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
        """Put this rank's part of `whole` where the optimizer steps, and into the parameter."""
        from deepspeed import utils

        if self._stage == 3:
            # Not safe_set_full_*, which slices the last rank's part of an uneven parameter without its padding.
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
        """After all writes, set Adam's step count, and at stage 3 the parameters from what was written. A collective there."""
        for tensor in self._stepped:
            self._inner.state[tensor][_STEP].fill_(num_steps)
        if self._stage == 3:
            self._outer.checkpoint_event_prologue()
            for number in range(len(self._stepped)):
                self._outer._reassign_or_swap_out_partitioned_parameters(number)
            self._outer.checkpoint_event_epilogue()
