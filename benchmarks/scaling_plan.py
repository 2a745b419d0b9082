"""The predicted tables of docs/scaling.md: what `rec-dist plan` says of S-DPO at 8B and 70B on 8, 64 and 512 H100. Nothing runs.

    python -m benchmarks.scaling_plan                    about 2 minutes
    python -m benchmarks.scaling_plan --out scaling_plan.json
    python -m benchmarks.scaling_plan --markdown scaling_plan.json

Each row is the run llama3-8b:sdpo (configs/recipes/llama3-8b.yaml) with the keys that its JSON lists.
"""

from typing import Any

from benchmarks import results
from rec_dist.config.load import load_config
from rec_dist.plan.report import make_plan

CONFIG = "llama3-8b:sdpo"
CLUSTERS = {8: "8xh100", 64: "8x8xh100", 512: "64x8xh100"}
MODELS = {
    "8B, LoRA r16": ("llama3-8b", "lora"),
    "8B, all weights": ("llama3-8b", "none"),
    "70B, LoRA r16": ("llama3-70b", "lora"),
    "70B, all weights": ("llama3-70b", "none"),
}
GROUPS_PER_GPU, GLOBAL_GROUPS = 22, 11_264  # one micro-batch a GPU; the same number on 512
WHOLE_PROMPT = 512  # rows: a prompt of 368 tokens and 16 completions of 10, which fill micro-batches of 1,024 and more exactly


def one(what: str, gpus: int, **keys: Any) -> dict[str, Any]:
    """The plan of a row, and the keys that produce it."""
    model, adapter = MODELS[what]
    changes = {
        "plan.cluster": CLUSTERS[gpus],
        "plan.model": model,
        "cluster.num_workers": gpus,
        "cluster.zero_stage": 3,
        "adapter.kind": adapter,
        **keys,
    }
    plan = make_plan(load_config(CONFIG, [f"{key}={value}" for key, value in changes.items()]))
    return {
        "what": what,
        "gpus": gpus,
        "keys": {key: str(value) for key, value in changes.items()},
        **{part: plan[part] for part in ("memory", "workload", "step")},
    }


def plans() -> dict[str, list[dict[str, Any]]]:
    """The rows of the three tables."""
    each = [(what, gpus) for what in MODELS for gpus in CLUSTERS]
    tokens = [1024, 2048, 4096, 8192, 16384]
    return {
        "weak": [one(what, gpus, **{"train.global_batch_size": GROUPS_PER_GPU * gpus}) for what, gpus in each],
        "strong": [one(what, gpus, **{"train.global_batch_size": GLOBAL_GROUPS}) for what, gpus in each],
        "binding": [
            one(
                "8B, LoRA r16",
                gpus,
                **{
                    "train.max_tokens_per_micro_batch": size,
                    "plan.prompt_tokens": 368,
                    "train.global_batch_size": gpus * size // WHOLE_PROMPT,
                },
            )
            for size in tokens
            for gpus in (8, 512)
        ],
    }


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """The three tables."""
    parts = [
        results.table(_weak(result["rows"]["weak"]), markdown=markdown),
        results.table(_strong(result["rows"]["strong"]), markdown=markdown),
    ]
    parts.append(results.table(_binding(result["rows"]["binding"]), markdown=markdown))
    return "\n\n".join([*parts, results.stamp(result)])


def _weak(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    shown = []
    for row in rows:
        total, step = row["memory"]["total_bytes"] / 1e9, row["step"]
        if not row["memory"]["fits"]:
            shown.append({"model, what trains": row["what"], "GPUs": str(row["gpus"]), "GB": f"{total:.1f}: does not fit"})
            continue
        shown.append(
            {
                "model, what trains": row["what"],
                "GPUs": str(row["gpus"]),
                "GB": f"{total:.1f}",
                "compute s": f"{step['compute_seconds']:.2f}",
                "gathers s": f"{step['gather_seconds']:.2f}",
                "reductions s": f"{step['reduce_seconds']:.2f}",
                "step s": f"{step['seconds']:.2f}",
                "tokens/s": f"{step['tokens_per_second']:,.0f}",
                "MFU": f"{step['mfu']:.0%}",
                "efficiency": _efficiency(row, rows),
            }
        )
    return shown


def _strong(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    return [
        {
            "model, what trains": row["what"],
            "GPUs": str(row["gpus"]),
            "micro-batches a GPU": str(row["workload"]["micro_batches_per_step"]),
            "filled": f"{row['workload']['fill']:.0%}",
            "step s": f"{row['step']['seconds']:.3g}",
            "tokens/s": f"{row['step']['tokens_per_second']:,.0f}",
            "efficiency": _efficiency(row, rows),
        }
        for row in rows
        if row["memory"]["fits"]
    ]


def _efficiency(row: dict[str, Any], rows: list[dict[str, Any]]) -> str:
    """Tokens/s a GPU relative to the smallest cluster that holds the model."""
    first = next(other for other in rows if other["what"] == row["what"] and other["memory"]["fits"])
    if first is row:
        return "1"
    share = row["step"]["tokens_per_second"] / row["gpus"] / (first["step"]["tokens_per_second"] / first["gpus"])
    return f"{share:.2f}"


def _binding(rows: list[dict[str, Any]]) -> list[dict[str, str]]:
    shown = []
    for few, many in zip(rows[::2], rows[1::2], strict=True):
        cells = {"tokens a micro-batch": f"{int(few['keys']['train.max_tokens_per_micro_batch']):,}"}
        for row in (few, many):
            step = row["step"]
            parts = ", ".join(f"{step[name]:.2f}" for name in ("compute_seconds", "gather_seconds", "seconds"))
            cells |= {f"{row['gpus']} GPUs: compute, gathers, step": f"{parts} s", f"MFU, {row['gpus']}": f"{step['mfu']:.0%}"}
        shown.append({**cells, "limited by, at 512": many["step"]["limit"]})
    return shown


def main(arguments: list[str] | None = None) -> None:
    """Plans every row, prints the tables, writes a file."""
    results.plan_rows("benchmarks.scaling_plan", __doc__, plans, report, arguments)


if __name__ == "__main__":
    main()
