"""Training steps through the real code: TrainStep, Engine (DeepSpeed) and Scorer, with optimizer, on random models.

ZeRO stage 0 on one GPU, and stage 2 with a process for each GPU where there are several. "plain torch" is the same step without
DeepSpeed, which shows what that costs, and what is left to measure where DeepSpeed is not installed. A step has two micro-batches.
MFU is that of a run (rec_dist/training/flops.py).
"""

import json
import math
import os
import socket
import tempfile
from collections.abc import Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.gpu_attention import prompts_of
from benchmarks.gpu_peers import LLAMA_1B, LLAMA_8B, Setting, bf16_peak, build_setting, groups_of
from benchmarks.gpu_rows import NotMeasuredError, Place, Row, Suite, timed
from benchmarks.peer_methods import BETA, TINY
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
from rec_dist.runtime.world import World
from rec_dist.training.flops import step_flops
from rec_dist.training.loader import StepWork, divide
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


def cases(*, tiny: bool) -> list[Case]:
    """The rows of one process, most important first, since time may run out."""
    if tiny:
        setting = Setting("tiny LoRA", TINY, True, 128)
        return [Case(setting), Case(setting, PLAIN)]
    large, small = Setting("8B LoRA", LLAMA_8B, True, 8192), Setting("1B LoRA", LLAMA_1B, True, 16384)
    return [Case(large), Case(large, fused=True), Case(small), Case(large, PLAIN), Case(small, PLAIN)]


@dataclass(frozen=True)
class Groups:
    """The data of a step (methods.task.TaskData): random prompts, each with one group."""

    prompts: Sequence[GroupedPrompt]

    def examples(self, indices: Any, epochs: Any) -> Sequence[GroupedPrompt]:
        return [self.prompts[index] for index in indices]

    def collate(self, examples: Sequence[GroupedPrompt], *, step: int) -> PackedBatch:
        return pack_prompts(list(examples))

    def users(self, indices: Any) -> list[str]:
        return [f"random user {index}" for index in indices]


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
    return Scorer(model, method.loss, method.metric_names, method.preference, max_tokens=case.setting.micro_batch)


def _work(module: Scorer, setting: Setting, point: Point, world: World, micro_batches: int) -> tuple[StepWork, Task]:
    """The step's micro-batches, divided as a run divides them, and the task around them."""
    groups = groups_of("d", point, setting.micro_batch) * micro_batches * world.size
    prompts = prompts_of(replace(point, groups=groups), setting.shape.vocab)
    base = module.base
    model = TaskModel(build=lambda: module, dtype=base.dtype, width=base.config.hidden_size, metric_names=module.metric_names)
    sampler = GlobalBatchSampler(num_examples=groups, examples_per_step=groups, epochs=1, seed=0)
    task = Task("benchmark", sampler, Groups(prompts), model, save=lambda weights, module, folder: None)
    return divide(task, prompts, step=0, epoch=0, max_tokens=setting.micro_batch, world=world), task


def check_available(case: Case) -> None:
    """Raises NotMeasuredError or ModuleNotFoundError if this commit or machine lacks what the case needs."""
    if case.engine == DEEPSPEED:
        import deepspeed  # noqa: F401
    if case.fused:
        check_fused_layers()


def check_fused_layers() -> None:
    """Raises NotMeasuredError if this commit has no rec_dist/models/fused_layers.py."""
    from importlib.util import find_spec

    if find_spec("rec_dist.models.fused_layers") is None:
        raise NotMeasuredError("not available, since this commit has no rec_dist/models/fused_layers.py")


@contextmanager
def group_of(case: Case, world: World) -> Any:
    """Inside, this process is in the group that DeepSpeed needs."""
    if case.engine == PLAIN:
        yield
        return
    with process_group.joined(world):
        yield


def measure(case: Case, place: Place, world: World, repeats: int, *, zero_stage: int = 0) -> Row:
    """Time, speed and memory of a step."""
    check_available(case)
    with group_of(case, world):
        bench = Bench(case, place, world, zero_stage=zero_stage)
        row = timed(bench.step, place.device, repeats=repeats)
        return {**row, **bench.speed(row["milliseconds"]["median"], bf16_peak(place), world), "GPUs": world.size}


def measure_several(case: Case, place: Place, size: int, repeats: int, *, zero_stage: int) -> Row:
    """The same with `size` processes, each with a device of its own; the row is that of rank 0."""
    check_available(case)
    with tempfile.TemporaryDirectory(prefix="gpu-engine-") as folder:
        out = Path(folder) / "row.json"
        arguments = (size, free_port(), case, place, repeats, zero_stage, out)
        torch.multiprocessing.spawn(_one_of_several, arguments, nprocs=size)  # type: ignore[no-untyped-call]
        row: Row = json.loads(out.read_text(encoding="utf-8"))
        return row


def _one_of_several(rank: int, size: int, port: int, case: Case, place: Place, repeats: int, zero_stage: int, out: Path) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    own = replace(place, device=f"cuda:{rank}" if place.on_gpu else "cpu")
    world = World(rank=rank, size=size, local_rank=rank, device=own.device)
    row = measure(case, own, world, repeats, zero_stage=zero_stage)
    if world.is_main:
        out.write_text(json.dumps(row), encoding="utf-8")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def run(suite: Suite) -> None:
    """A row for each case on one device, and one for all GPUs together."""
    place = suite.place
    for case in cases(tiny=place.tiny):
        suite.fresh()
        expected = (30.0 if case.setting.shape == LLAMA_8B else 20.0) if place.on_gpu else 0.0
        suite.row(
            about(case, stage=0),
            expected,
            lambda case=case: measure(case, place, World(device=place.device), suite.repeats),  # type: ignore[misc]
        )
    suite.fresh()
    several = Case(cases(tiny=place.tiny)[0].setting)
    suite.row(about(several, stage=2), 60.0 if place.on_gpu else 0.0, lambda: _on_all_gpus(several, place, suite.repeats))


def about(case: Case, *, stage: int) -> Row:
    """What a row is about."""
    layers = "fused" if case.fused else "plain"
    return {
        "model": case.setting.name,
        "tokens a micro-batch": case.setting.micro_batch,
        "engine": case.engine,
        "ZeRO": stage if case.engine == DEEPSPEED else "",
        "layers": layers,
    }


def _on_all_gpus(case: Case, place: Place, repeats: int) -> Row:
    size = torch.cuda.device_count() if place.on_gpu else 0
    if size < 2:
        raise NotMeasuredError(f"stage 2 is for several GPUs, and this machine has {size}")
    return measure_several(case, place, size, repeats, zero_stage=2)
