"""A training step through the real code that can be repeated: TrainStep, Engine (DeepSpeed) and Scorer, on random models.

"plain torch" is the same step without DeepSpeed, which shows what that costs, and what is left to measure where DeepSpeed is not
installed. A step has two micro-batches; they are divided as a run divides them.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.gpu_attention import prompts_of
from benchmarks.gpu_peers import Setting, build_setting, groups_of
from benchmarks.gpu_rows import NotMeasuredError, Place, Row
from benchmarks.peer_methods import BETA
from benchmarks.peer_targets import Point
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.engine import process_group
from rec_dist.engine.engine import Engine
from rec_dist.engine.settings import EngineSettings
from rec_dist.methods.preference import sdpo
from rec_dist.methods.task import NoExchange, Task, TaskModel
from rec_dist.models.attention_paths import base_of, choose_attention
from rec_dist.models.flex import allow_compilations
from rec_dist.models.fused_lora import fuse_lora
from rec_dist.models.scorer import Scorer
from rec_dist.models.size import count_weights
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist.packing.sizes import OneByOne, Sizes
from rec_dist.runtime.world import World
from rec_dist.training.flops import step_flops
from rec_dist.training.loader import StepWork, step_work
from rec_dist.training.loop import EngineProtocol, TrainStep
from rec_dist.training.reference import NoReference

MICRO_BATCHES = 2
LR = 1e-5
DEEPSPEED, PLAIN = "DeepSpeed", "plain torch"


@dataclass(frozen=True)
class Case:
    """A row: the model, its engine, and whether RMSNorm, SwiGLU and RoPE are fused (rec_dist/models/fused_layers.py)."""

    setting: Setting
    engine: str = DEEPSPEED
    fused: bool = False


def point_of(*, tiny: bool) -> Point:
    """P, C and K of every group; the number of groups follows from the token budget."""
    return Point(20, 8, 3, 1) if tiny else Point(512, 8, 3, 1)


@dataclass(frozen=True)
class Groups:
    """The data of a step (methods.task.TaskData): random prompts, each with one group."""

    prompts: Sequence[GroupedPrompt]

    def draw(self, indices: Any, epochs: Any) -> OneByOne:
        chosen = [self.prompts[index] for index in indices]
        return OneByOne(_sizes(chosen), chosen.__getitem__)

    def collate(self, examples: Sequence[GroupedPrompt], *, step: int) -> PackedBatch:
        return pack_prompts(list(examples))

    def users(self, indices: Any) -> list[str]:
        return [f"random user {index}" for index in indices]


def _sizes(prompts: Sequence[GroupedPrompt]) -> Sizes:
    return Sizes(*(np.asarray([getattr(prompt, field.name) for prompt in prompts], dtype=np.int64) for field in fields(Sizes)))


class PlainEngine:
    """The calls of engine.Engine on one device, without DeepSpeed: clipping, and AdamW in the dtype of the weights."""

    def __init__(self, module: torch.nn.Module, *, device: str, optimizer: torch.optim.Optimizer) -> None:
        self.module = module
        self._device = device
        self._optimizer = optimizer

    def train_mode(self, on: bool) -> None:
        self.module.train(on)

    def forward(self, batch: Any) -> Any:
        return self.module(batch.to(self._device))

    def backward(self, loss: Tensor, *, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]

    def step(self, lr: float, *, discard: bool = False) -> float:
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        norm = float(torch.nn.utils.clip_grad_norm_(trained, 1.0))
        if math.isfinite(norm) and not discard:
            for group in self._optimizer.param_groups:
                group["lr"] = lr
            self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=True)
        return float("nan") if discard else norm


class Bench:
    """A step that can be repeated: model, engine, and a rank's share of MICRO_BATCHES micro-batches for each rank.

    Use it inside process_group.joined(world) for DeepSpeed. Raises ModuleNotFoundError if a package is missing.
    """

    def __init__(
        self, case: Case, place: Place, world: World, *, zero_stage: int = 0, micro_batches: int = MICRO_BATCHES
    ) -> None:
        setting, point = case.setting, point_of(tiny=place.tiny)
        self.module = _scorer(case, place, point)
        self.work, task = _work(self.module, setting, point, world, micro_batches)
        trained = [parameter for parameter in self.module.parameters() if parameter.requires_grad]
        optimizer = torch.optim.AdamW(trained, lr=LR)
        engine: EngineProtocol
        if case.engine == PLAIN:
            engine = PlainEngine(self.module, device=place.device, optimizer=optimizer)
        else:
            bf16, width = place.dtype == torch.bfloat16, setting.shape.hidden
            settings = EngineSettings(zero_stage=zero_stage, bf16=bf16, max_grad_norm=1.0, hidden_size=width)
            engine = Engine(self.module, settings, device=place.device, optimizer=optimizer)
        engine.train_mode(True)  # type: ignore[attr-defined]
        self._train = TrainStep(engine, task, NoReference(), NoExchange(), lambda batch: None, world)
        self.losses: list[float] = []

    def step(self) -> None:
        """One global step as a run makes it; its loss is appended to `losses`."""
        result = self._train.update(self.work, self._train.forward_backward(self.work), lr=LR)
        self.losses.append(result.numbers["loss"])

    def speed(self, milliseconds: float, peak: float | None, world: World) -> Row:
        """What a step of this duration means. peak: FLOP/s of one GPU."""
        seconds, work = milliseconds / 1e3, self.work
        weights = count_weights(self.module)
        assert weights is not None, "a dense decoder"
        rows = sum(len(batch.rows.unique()) for batch in work.batches) * world.size
        flops = step_flops(
            work.num_tokens,
            rows,
            frozen=weights.frozen,
            training=weights.training,
            head=weights.head,
            head_trains=weights.head_trains,
        )
        return {
            "tokens": work.num_tokens,
            "groups": work.num_groups,
            "tokens/s": work.num_tokens / seconds,
            "groups/s": work.num_groups / seconds,
            "mfu": flops / (seconds * peak * world.size) if peak else None,
            "loss": self.losses[-1],
        }


def _scorer(case: Case, place: Place, point: Point) -> Scorer:
    model: Any = build_setting(case.setting, place)
    base, method = base_of(model), sdpo(beta=BETA, num_negatives=point.negatives)
    base.set_attn_implementation(choose_attention("auto", base.config, device=place.device))
    allow_compilations()
    if case.fused:
        from rec_dist.models.fused_layers import fuse_layers

        fuse_layers(base)
    fuse_lora(model)
    return Scorer(model, method.loss, method.metric_names, method.preference)


def _work(module: Scorer, setting: Setting, point: Point, world: World, micro_batches: int) -> tuple[StepWork, Task]:
    """The step's micro-batches, divided as a run divides them, and the task around them."""
    groups = groups_of("d", point, setting.micro_batch) * micro_batches * world.size
    prompts = prompts_of(replace(point, groups=groups), setting.shape.vocab)
    base = module.base
    model = TaskModel(build=lambda: module, dtype=base.dtype, width=base.config.hidden_size, metric_names=module.metric_names)
    sampler = GlobalBatchSampler(num_examples=groups, examples_per_step=groups, epochs=1, seed=0)
    task = Task("benchmark", sampler, Groups(prompts), model, save=lambda weights, module, folder: None)
    return step_work(task, 0, max_tokens=setting.micro_batch, world=world), task


def check_available(case: Case, device: str) -> None:
    """Raises NotMeasuredError or ModuleNotFoundError if this commit or machine lacks what the case needs."""
    if case.engine == DEEPSPEED:
        import deepspeed  # noqa: F401
    if case.fused:
        check_fused_layers(device)


def check_fused_layers(device: str) -> None:
    """Raises NotMeasuredError where Liger's kernels cannot run."""
    if not device.startswith("cuda"):
        raise NotMeasuredError("Liger's kernels need a GPU")
    if find_spec("liger_kernel") is None:
        raise NotMeasuredError("liger-kernel is not installed")


@contextmanager
def group_of(case: Case, world: World) -> Iterator[None]:
    """Inside, this process is in the group that DeepSpeed needs."""
    if case.engine == PLAIN:
        yield
        return
    with process_group.joined(world):
        yield
