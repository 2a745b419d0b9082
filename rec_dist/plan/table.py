"""The plan as text, one fact a line."""

import textwrap
from typing import Any

_NAME, _TEXT = 21, 100


def text_table(report: dict[str, Any]) -> list[str]:
    """Lines of a name and a fact."""
    cluster, model, settings = report["cluster"], report["model"], report["settings"]
    there = f"{cluster['nodes'] * cluster['gpus_per_node']} x {cluster['device']}"
    what = f"{cluster['workers']} of {there}" if cluster["gpu"] else f"{cluster['workers']} worker(s) on {there}"
    keys = ", ".join(f"{key}={_value(value)}" for key, value in settings.items() if not key.startswith("plan."))
    rows = [
        ("cluster", f"{cluster['name']}; {what}, {cluster['nodes_used']} node(s)"),
        ("model", f"{model['path']}: {model['base_parameters']:,} parameters, {model['trainable']:,} train, {model['dtype']}"),
        ("settings", keys),
        *_memory(report["memory"], cluster["nodes"]),
        *_stages(report["stages"]),
        *_step(report),
        *_run(report),
        ("assumed", _assumptions(report)),
    ]
    lines = []
    for name, value in rows:
        parts = textwrap.wrap(value, _TEXT) if len(value) > _TEXT else [value]
        lines += [f"{name if not place else '':<{_NAME}} {part}".rstrip() for place, part in enumerate(parts)]
    return lines


def _value(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _change(change: dict[str, Any], nodes_there: int) -> str:
    keys = " ".join(f"{key}={_value(value)}" for key, value in change["keys"].items())
    nodes = f", {change['nodes']} node(s)" if "cluster.num_workers" in change["keys"] else ""
    more = f"; set plan.cluster to a file with {change['nodes']} nodes" if change["nodes"] > nodes_there else ""
    return f"{keys} ({change['needs_bytes'] / 1e9:.1f} GB{nodes}){more}"


def _memory(memory: dict[str, Any], nodes_there: int) -> list[tuple[str, str]]:
    total, device = memory["total_bytes"], memory["device_bytes"]
    rows = [("memory a device", "GB")]
    rows += [(f"  {name}", f"{size / 1e9:9.3f}") for name, size in memory["parts"].items()]
    verdict = "fits" if memory["fits"] else "DOES NOT FIT"
    rows.append(("  total", f"{total / 1e9:9.3f} of {device / 1e9:.1f} ({total / device:.0%}): {verdict}"))
    if memory["fits"]:
        fill = f"train.global_batch_size={memory['groups_for_largest']} fills it"
        rows.append(("", f"the largest train.max_tokens_per_micro_batch that fits: {memory['largest_max_tokens']:,}; {fill}"))
        return rows
    for change in memory["changes"]:
        rows.append(("  fits with", _change(change, nodes_there)))
    if memory["together"] is not None:
        rows.append(("  fits with all of", _change(memory["together"], nodes_there)))
    if not memory["changes"] and memory["together"] is None:
        rows.append(("", "no change of these keys makes it fit: choose a smaller model, adapter.kind=lora or larger devices"))
    return rows


def _stages(stages: list[dict[str, Any]]) -> list[tuple[str, str]]:
    rows = []
    for row in stages:
        verdict = f"{row['needs_bytes'] / 1e9:.1f} GB" + ("" if row["fits"] else ", does not fit")
        taken = "; cluster.zero_stage=auto takes it" if row["auto"] else ""
        rows.append((f"  at ZeRO stage {row['stage']}", f"{verdict}; {row['seconds']:.4g} s a step{taken}"))
    return rows


def _step(report: dict[str, Any]) -> list[tuple[str, str]]:
    step, work = report["step"], report["workload"]
    micro_batches = (
        f"{work['micro_batches_per_step']} micro-batch(es) a device of {work['rows_per_micro_batch']:,.0f} rows, "
        f"{work['fill']:.0%} of the budget filled"
    )
    rows = [
        ("a step", f"{work['groups']} groups, {work['prompt_rows']:,.0f} rows a prompt (prompt {work['prompt']:,.0f})"),
        ("", micro_batches),
    ]
    if work["fill"] < 0.85 and work["groups_for_full_micro_batches"] > work["groups"]:
        rows.append(("", f"train.global_batch_size={work['groups_for_full_micro_batches']} would fill the same micro-batches"))
    hidden = f"{step['hidden_seconds']:.4g} s of the gathers hidden behind compute"
    return [
        *rows,
        ("  compute", f"{step['compute_seconds']:.4g} s"),
        ("  ZeRO gathers", f"{step['gather_seconds']:.4g} s"),
        ("  reductions", f"{step['reduce_seconds']:.4g} s"),
        ("  host", f"{step['host_seconds']:.4g} s that the device waits for it"),
        ("  step", f"{step['seconds']:.4g} s, {hidden}; {step['seconds_without_overlap']:.4g} s if none were"),
        ("  limited by", step["limit"]),
        ("  mfu", f"{step['mfu']:.1%}"),
        ("  tokens/s", f"{step['tokens_per_second']:,.0f} (all devices)"),
        ("  groups/s", f"{step['groups_per_second']:,.1f}"),
    ]


def _run(report: dict[str, Any]) -> list[tuple[str, str]]:
    run = report["run"]
    hours = run["seconds"] / 3600
    length = f"{hours:.2f} h" if hours >= 1 else f"{run['seconds'] / 60:.1f} min"
    reference = f", {run['reference_seconds']:.0f} s of it for the cached reference" if run["reference_seconds"] else ""
    return [
        ("the run", f"{run['steps']:,} steps ({run['steps_from']}): {length}{reference}"),
        ("  device hours", f"{run['gpu_hours']:,.1f}"),
    ]


def _assumptions(report: dict[str, Any]) -> str:
    cluster, settings, work = report["cluster"], report["settings"], report["workload"]
    cut = (
        f"prompts cut from {work['prompt_assumed']:,.0f} to {work['prompt']:,.0f} tokens, so that one fits a micro-batch "
        "(plan.prompt_tokens sets the mean of your data); "
        if work["prompt"] < work["prompt_assumed"]
        else ""
    )
    return (
        f"{cut}"
        f"{cluster['achievable_fraction']:.0%} of peak ({cluster['achievable_source']}); "
        f"links at {cluster['link_efficiency']:.0%}; plan.overlap={settings['plan.overlap']}, plan.margin={settings['plan.margin']}; "
        "lengths are means; predicted, not measured"
    )
