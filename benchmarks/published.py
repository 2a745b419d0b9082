"""Compares runs that others have published, with their source, with what `rec-dist plan` predicts for them.

    python -m benchmarks.published                     about 20 s; nothing runs
    python -m benchmarks.published --out published.json
    python -m benchmarks.published --markdown published.json

None of the published numbers is ours: others ran other programs (FSDP, LitGPT, transformers) on their GPUs. A plan describes
this program, so a difference comes from both programs. It shows whether the formulas have the right magnitude. A full
sequence is planned as one completion of its length. The shipped cluster files are used with their assumptions.
"""

from dataclasses import dataclass
from typing import Any

from benchmarks import results
from rec_dist.config.schema import RunConfig
from rec_dist.plan.report import make_plan

_TITAN = "pytorch/torchtitan docs/performance.md at 0413364"
_TITAN_H100 = "pytorch/torchtitan benchmarks/llama3_h100_202412_torchtitan.md at 31a17bf"
_LITGPT = "Lightning-AI/litgpt tutorials/resource-tables.md at 4839345"
_PEFT = "huggingface/peft docs/source/accelerate/deepspeed.md at 09802c1"


@dataclass(frozen=True)
class Published:
    """A run as its source reports it.

    batch: sequences a device; speed: tokens a second and device; memory: GB (1e9) of a device.
    differs: how it differs from a run of ours.
    """

    what: str
    model: str
    cluster: str
    devices: int
    sequence: int
    batch: int
    checkpointing: bool
    lora: tuple[int, list[str] | str] | None
    speed: float | None
    memory: float | None
    source: str
    differs: str


RUNS = (
    Published(
        "Llama 3 70B, all weights", "llama3-70b", "8x8xa100", 64, 8192, 1, True, None, 331, None, _TITAN, "FSDP2, float32 weights"
    ),
    Published(
        "Llama 2 13B, all weights",
        "llama2-13b",
        "8x8xa100",
        64,
        4096,
        2,
        False,
        None,
        2162,
        None,
        _TITAN,
        "FSDP2, float32 weights",
    ),
    Published(
        "Llama 3.1 8B, all weights",
        "llama3-8b",
        "8xh100",
        8,
        8192,
        2,
        True,
        None,
        5762,
        82.4 * 1.073741824,
        _TITAN_H100,
        "FSDP2, float32 weights; keeps part of the activations, the plan none; H100 of 96 GB at 500 W",
    ),
    Published(
        "the same",
        "llama3-8b",
        "8xh100",
        8,
        8192,
        2,
        False,
        None,
        5762,
        82.4 * 1.073741824,
        _TITAN_H100,
        "the same, planned with all activations kept",
    ),
    Published(
        "Llama 2 70B, LoRA r8 on all linear layers",
        "llama2-70b",
        "8xh100",
        8,
        2048,
        8,
        True,
        (8, "all-linear"),
        None,
        64.0,
        _PEFT,
        "ZeRO-3; whole logits; memory as the driver shows it",
    ),
    Published(
        "Llama 2 7B, LoRA r8 on q and v",
        "llama2-7b",
        "8xa100",
        1,
        1304,
        1,
        False,
        (8, ["q_proj", "v_proj"]),
        None,
        21.30,
        _LITGPT,
        "whole logits; memory as torch counts its tensors",
    ),
    Published(
        "the same, 2 sequences",
        "llama2-7b",
        "8xa100",
        1,
        1304,
        2,
        False,
        (8, ["q_proj", "v_proj"]),
        None,
        29.07,
        _LITGPT,
        "whole logits; memory as torch counts its tensors",
    ),
    Published(
        "Llama 2 13B, LoRA r8 on q and v",
        "llama2-13b",
        "8xa100",
        1,
        1304,
        1,
        False,
        (8, ["q_proj", "v_proj"]),
        None,
        38.12,
        _LITGPT,
        "whole logits; memory as torch counts its tensors",
    ),
)


def config_of(run: Published) -> RunConfig:
    """The run as a configuration of ours: plain fine-tuning on sequences in which every token is scored."""
    lora = {"kind": "none"} if run.lora is None else {"kind": "lora", "rank": run.lora[0], "target_modules": run.lora[1]}
    return RunConfig.model_validate(
        {
            "data": {"source": "none", "path": "none"},
            "model": {"dtype": "bfloat16", "attention": "flex", "activation_checkpointing": run.checkpointing},
            "adapter": lora,
            "task": {"kind": "sft"},
            "train": {
                "run_dir": "none",
                "max_steps": 1,
                "global_batch_size": run.batch * run.devices,
                "max_tokens_per_micro_batch": run.batch * run.sequence,
            },
            "cluster": {"num_workers": run.devices, "zero_stage": 3 if run.devices > 1 else 0},
            "plan": {
                "cluster": run.cluster,
                "model": run.model,
                "prompt_tokens": 1.0,
                "completion_tokens": float(run.sequence),
            },
        }
    )


def row_of(run: Published) -> dict[str, Any]:
    """The run beside its plan."""
    plan = make_plan(config_of(run))
    speed = plan["step"]["tokens_per_second"] / run.devices
    parts = plan["memory"]["parts"]
    tensors = sum(value for part, value in parts.items() if part not in ("fragmentation", "reserved"))
    return {
        "run": run.what,
        "devices": f"{run.devices} x {'H100' if 'h100' in run.cluster else 'A100'}",
        "tokens a device": f"{run.batch} x {run.sequence}",
        "tokens/s a device, published": None if run.speed is None else f"{run.speed:,.0f}",
        "planned tokens/s": None if run.speed is None else f"{speed:,.0f}",
        "GB, published": None if run.memory is None else f"{run.memory:.1f}",
        "planned, tensors": None if run.memory is None else f"{tensors / 1e9:.1f}",
        "planned, with margin": None if run.memory is None else f"{plan['memory']['total_bytes'] / 1e9:.1f}",
        "differs": run.differs,
        "source": run.source,
    }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The table."""
    return f"{results.table(result['rows'], markdown=markdown)}\n\n{results.stamp(result)}"


def main(arguments: list[str] | None = None) -> None:
    """Plans every run, prints the table, writes a file."""
    results.plan_rows("benchmarks.published", __doc__, lambda: [row_of(run) for run in RUNS], report, arguments)


if __name__ == "__main__":
    main()
