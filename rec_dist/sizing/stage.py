"""The ZeRO stage of a run whose cluster.zero_stage is auto: the smallest one that fits the device, by the formulas of memory.py.

A larger stage needs less memory and more time. Stage 3 in particular gathers every layer in every pass, and the host spends
milliseconds around each (plan/step.py). Checkpoints do not depend on the stage.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from rec_dist.engine.settings import EngineSettings, deepspeed_config
from rec_dist.errors import UserError
from rec_dist.models.architecture import count_parameters, read_architecture
from rec_dist.models.assemble import ModelSpec
from rec_dist.models.language import LoraSpec
from rec_dist.sizing.memory import Setup, memory, scoring_bytes
from rec_dist.sizing.shares import Zero

# Beside torch's tensors: CUDA's context, NCCL and cuBLAS, or Python and its libraries. Assumed, as in configs/plan/clusters.
_RESERVED_ON_GPU, _RESERVED_ON_CPU = 2.0e9, 0.7e9
# Workers on CPUs keep the memory that they free (runtime/allocator.py): docs/planning.md, "Whole runs on CPUs".
_MARGIN_ON_CPU = 0.7
_GIGA = 1e9


@dataclass(frozen=True)
class Room:
    """What a device has: its bytes, those taken beside torch's tensors, and the share added for fragmentation."""

    device: float
    reserved: float
    margin: float


def reserved_on(*, gpu: bool) -> float:
    """Bytes of a device that are taken beside torch's tensors, where no cluster file says so."""
    return _RESERVED_ON_GPU if gpu else _RESERVED_ON_CPU


@dataclass(frozen=True)
class StageChoice:
    """needs: stage -> bytes, for each stage that was considered. If none fits, `stage` is the one that needs least."""

    stage: int
    needs: dict[int, float]
    device: float

    @property
    def fits(self) -> bool:
        """Whether the device holds the stage."""
        return self.needs[self.stage] <= self.device

    @property
    def why(self) -> str:
        """The reason, for people."""
        needs = self.needs[self.stage] / _GIGA
        verdict = "the smallest that fits" if self.fits else "which needs least, and by this count does not fit"
        others = "".join(f"; stage {s} needs {n / _GIGA:.1f} GB" for s, n in self.needs.items() if s != self.stage)
        return f"{verdict}: it needs {needs:.1f} of a device's {self.device / _GIGA:.1f} GB{others}"


@dataclass(frozen=True)
class Purpose:
    """What the engine is for. stages: (workers, bf16) -> the stages that auto considers, smallest first. needs: bytes of a device."""

    stages: Callable[[int, bool], Sequence[int]]
    needs: Callable[[Setup, Room], float]


def _training_stages(workers: int, bf16: bool) -> Sequence[int]:
    """bfloat16 begins at 2: below it DeepSpeed sums the gradients of a step's micro-batches in bfloat16, and the result would
    depend on how they are packed. One worker has nobody to share with.
    """
    first = 2 if bf16 else 0
    return (first,) if workers == 1 else range(first, 4)


def _scoring_stages(workers: int, bf16: bool) -> Sequence[int]:
    """Without an optimizer only weights can be shared out."""
    return (0,) if workers == 1 else (0, 3)


TRAINING = Purpose(_training_stages, lambda setup, room: sum(memory(setup, reserved=room.reserved, margin=room.margin).values()))
SCORING = Purpose(_scoring_stages, lambda setup, room: scoring_bytes(setup, reserved=room.reserved, margin=room.margin))


def smallest_stage(setup: Setup, settings: EngineSettings, purpose: Purpose, room: Room) -> StageChoice:
    """The smallest stage for `purpose` at which `setup` fits into `room`."""
    if not setup.on_gpu:
        room = replace(room, margin=max(room.margin, _MARGIN_ON_CPU))
    stages = purpose.stages(setup.workers, settings.bf16)
    needs = {stage: purpose.needs(at_stage(setup, settings, stage), room) for stage in stages}
    fitting = [stage for stage, size in needs.items() if size <= room.device]
    return StageChoice(fitting[0] if fitting else min(needs, key=lambda stage: needs[stage]), needs, room.device)


def at_stage(setup: Setup, settings: EngineSettings, stage: int) -> Setup:
    """The same setup at another stage."""
    return replace(setup, zero=zero_of(replace(settings, zero_stage=stage)))


def zero_of(settings: EngineSettings) -> Zero:
    """What the engine would configure in DeepSpeed."""
    zero = deepspeed_config(settings)["zero_optimization"]
    return Zero(
        stage=settings.zero_stage,
        persistence=zero.get("stage3_param_persistence_threshold", 0),
        reuse=min(zero.get("stage3_max_reuse_distance", 0), zero.get("stage3_max_live_parameters", 0)),
        prefetch=zero.get("stage3_prefetch_bucket_size", 0),
        bucket=zero.get("reduce_bucket_size", 0),
        hpz=zero.get("zero_hpz_partition_size", 1),
        layers=True,
    )


def decoder_setup(
    folder: Path,
    settings: EngineSettings,
    *,
    adapter: LoraSpec | None,
    num_virtual: int,
    max_tokens: int,
    attention: str,
    checkpointing: bool,
    reference: str = "none",
    trust_remote_code: bool = False,
) -> Setup:
    """Everything that decides the memory of the model whose config.json lies in `folder`. Reads no weights.

    num_virtual: soft prompt vectors that alone train, or 0. attention: model.attention. Raises UserError for a model that
    the formulas do not cover.
    """
    parameters = count_parameters(folder, adapter, num_virtual=num_virtual, trust_remote_code=trust_remote_code)
    if parameters.work is None:
        raise UserError(f"{folder} describes a mixture of experts, which is not planned; choose a dense decoder such as Llama")
    return Setup(
        shape=read_architecture(folder),
        parameters=parameters,
        zero=zero_of(settings),
        workers=settings.workers,
        element=2 if settings.loads_bf16 else 4,
        max_tokens=max_tokens,
        attention=_attention(attention, on_gpu=settings.on_gpu),
        checkpointing=checkpointing,
        rank=adapter.rank if adapter is not None else 0,
        on_gpu=settings.on_gpu,
        reference=reference,
        soft_prompt=num_virtual > 0,
    )


def setup_of_spec(spec: ModelSpec, settings: EngineSettings, *, max_tokens: int, reference: str) -> Setup:
    """decoder_setup of the model that a worker is about to build."""
    trained = spec.soft_prompt is not None and spec.soft_prompt.trains
    return decoder_setup(
        spec.path,
        settings,
        adapter=spec.adapter,
        num_virtual=spec.soft_prompt.num if trained and spec.soft_prompt is not None else 0,
        max_tokens=max_tokens,
        attention=spec.attention,
        checkpointing=spec.activation_checkpointing,
        reference=reference,
        trust_remote_code=spec.trust_remote_code,
    )


def _attention(wanted: str, *, on_gpu: bool) -> str:
    """The choice of models.attention_paths for a decoder that supports all of them."""
    if wanted == "auto":
        return "flex" if on_gpu else "per_prompt"
    return wanted
