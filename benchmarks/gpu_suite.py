"""All measurements that need a GPU, in one command and under 9 minutes.

It compares attention with the dense mask, heads with torch, and training steps with peers.

    PYTHONPATH=kernels python -m benchmarks.gpu_suite --out results.json
    python -m benchmarks.gpu_suite --markdown results.json

Needs torch >= 2.11, transformers >= 5.17, peft and numpy (and triton for its rows), but no Ray, DeepSpeed, OmegaConf or
network. If a row fails, the reason stands in its place and the next row runs. A row that does not fit into the time left is
skipped and marked as such. Without a GPU the suite runs tiny shapes on the CPU, which checks the script itself, and marks the
GPU's rows as not measured.
"""

import gc
import json
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks import gpu_attention, gpu_heads, gpu_peers, gpu_targets, results
from rec_dist.training.flops import known_peak

BUDGET_SECONDS = 520.0
Measure = Callable[[], dict[str, Any]]


class Suite:
    """Runs rows one after another within the time. A row that fails does not end the suite."""

    def __init__(self, device: str, budget: float) -> None:
        self.device = device
        self.deadline = time.perf_counter() + budget
        self.rows: list[dict[str, Any]] = []

    def row(self, about: dict[str, Any], expected_seconds: float, measure: Measure) -> dict[str, Any]:
        """Adds about | measure(), or the reason why there is no measurement."""
        left = self.deadline - time.perf_counter()
        row = {**about, "device": self.device, "status": "measured"}
        if left < expected_seconds:
            row["status"] = f"skipped: needs about {expected_seconds:.0f} s, {max(left, 0):.0f} s left"
        else:
            try:
                row |= measure()
            except Exception as fault:
                text = str(fault).strip().splitlines()
                row["status"] = f"failed: {type(fault).__name__}: {text[0][:160] if text else ''}"
        self.rows.append(row)
        print(json.dumps(row), file=sys.stderr, flush=True)
        self.free()
        return row

    def free(self) -> None:
        """Frees what the last row left behind."""
        gc.collect()
        if self.device != "cpu":
            torch.cuda.empty_cache()

    def time(self, step: Callable[[], Any], *, clear: Callable[[], None], repeats: int) -> dict[str, Any]:
        """Median milliseconds after two warm-up steps, and peak bytes above those held before."""
        on_gpu = self.device != "cpu"
        clear()
        if on_gpu:
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated() if on_gpu else 0
        samples = []
        for number in range(repeats + 2):
            clear()
            start = time.perf_counter()
            step()
            if on_gpu:
                torch.cuda.synchronize()
            if number >= 2:
                samples.append((time.perf_counter() - start) * 1e3)
        peak = torch.cuda.max_memory_allocated() - held if on_gpu else None
        clear()
        return {"milliseconds": results.spread(samples), "peak_bytes": peak}


def run_attention(suite: Suite) -> None:
    """Compares log-probs and gradients of the attention that this device uses with those of the dense mask."""
    suite.row({"section": "attention", "method": "auto against dense"}, 60.0, lambda: gpu_attention.compare(suite.device))


def run_heads(suite: Suite, *, repeats: int) -> None:
    """Runs every head method at every shape. The ratio is to the GEMMs that every method needs."""
    for vocab, scored, width, trains in gpu_heads.cases(suite.device):
        about = {"section": "head", "V": vocab, "M": scored, "D": width, "weight": "trains" if trains else "frozen"}
        try:
            case = gpu_heads.HeadCase(vocab, scored, width, trains, suite.device)
        except Exception as fault:
            suite.rows.append({**about, "method": "all", "status": f"failed: {type(fault).__name__}: {fault}"[:200]})
            continue
        bare = None
        for name, step in case.methods(compiled=suite.device != "cpu").items():
            expected = 25.0 if name == "torch.compile" else 4.0
            measure = lambda step=step, case=case: suite.time(step, clear=case.clear, repeats=repeats)
            row = suite.row({**about, "method": name}, expected, measure)
            if "milliseconds" in row:
                bare = row["milliseconds"]["median"] if name.startswith("GEMM") else bare
                row["x GEMMs"] = row["milliseconds"]["median"] / bare if bare else None
        del case, step, measure
        suite.free()


def run_peers(suite: Suite, *, repeats: int) -> None:
    """Runs a, b and d for every model and point, and compares ours with each."""
    peak = known_peak(torch.cuda.get_device_name()) if suite.device != "cpu" else None
    for setting in gpu_peers.settings(suite.device):
        about = {"section": "peers", "model": setting.name, "tokens a micro-batch": setting.micro_batch}
        holder: list[Any] = []
        built = suite.row({**about, "method": "build"}, 25.0, lambda: _build(holder, setting, suite.device))  # noqa: B023
        if not holder:
            continue
        suite.rows.remove(built)
        for point in gpu_peers.points(suite.device):
            speeds: dict[str, float] = {}
            for method in ("d", "b", "a") if setting.lora else ("d", "b"):
                here = {**about, "P": point.prompt, "K": point.negatives, "method": method}

                def measure(
                    method: str = method, point: Any = point, setting: Any = setting, holder: Any = holder
                ) -> dict[str, Any]:
                    runner = gpu_peers.build_method(method, holder[0], setting, point, suite.device)
                    clear = lambda: holder[0].zero_grad(set_to_none=True)
                    timed = suite.time(runner.step, clear=clear, repeats=repeats)
                    seconds = timed["milliseconds"]["median"] / 1e3
                    flops = gpu_peers.step_flops(method, setting, point)
                    mfu = flops / seconds / peak[0] if peak else None
                    speed = {"groups/s": runner.groups / seconds, "tokens/s": runner.num_tokens / seconds, "mfu": mfu}
                    return {**timed, **speed, "groups": runner.groups, "tokens": runner.num_tokens}

                row = suite.row(here, 15.0, measure)
                if "groups/s" in row:
                    speeds[method] = row["groups/s"]
                    row["d is x"] = speeds["d"] / row["groups/s"] if "d" in speeds else None
        holder.clear()
        suite.free()


def _build(holder: list[Any], setting: gpu_peers.Setting, device: str) -> dict[str, Any]:
    holder.append(gpu_peers.build_setting(setting, device))
    return {}


def not_measured() -> list[dict[str, Any]]:
    """The rows that only a GPU can fill."""
    heads = [
        {"section": "head", "device": "cuda", "V": vocab, "M": scored, "D": width, "method": "all"}
        for vocab, scored, width, _ in gpu_heads.cases("cuda")
    ]
    peers = [
        {
            "section": "peers",
            "device": "cuda",
            "model": setting.name,
            "tokens a micro-batch": setting.micro_batch,
            "P": point.prompt,
            "K": point.negatives,
        }
        for setting in gpu_peers.settings("cuda")
        for point in gpu_peers.points("cuda")
    ]
    attention = {"section": "attention", "device": "cuda", "method": "flex_attention against sdpa"}
    return [{**row, "method": row.get("method", "a, b, d"), "status": "not measured"} for row in (attention, *heads, *peers)]


def report(result: dict[str, Any], *, markdown: bool = False) -> str:
    """Renders the tables of a result."""

    def shown(row: dict[str, Any], names: tuple[str, ...]) -> dict[str, Any]:
        ms = row.get("milliseconds", {}).get("median")
        gib = row["peak_bytes"] / 2**30 if row.get("peak_bytes") else None
        status = "" if row["status"] == "measured" else row["status"]
        return {**{name: row.get(name) for name in names}, "ms": ms, "peak GiB": gib, "note": status}

    heads = ("device", "V", "M", "weight", "method", "x GEMMs")
    peers = (
        "device",
        "model",
        "tokens a micro-batch",
        "P",
        "K",
        "method",
        "groups",
        "tokens",
        "groups/s",
        "tokens/s",
        "mfu",
        "d is x",
    )
    attention = ("device", "method", "logps apart", "gradients apart", "compilations after the second micro-batch")
    rows = result["rows"]
    parts = [[shown(row, attention) for row in rows if row["section"] == "attention"]]
    parts += [[shown(row, heads) for row in rows if row["section"] == "head"]]
    parts += [[shown(row, peers) for row in rows if row["section"] == "peers"]]
    parts += [[verdict.row() for verdict in gpu_targets.verdicts(rows)]]
    return "\n\n".join([*(results.table(part, markdown=markdown) for part in parts), results.stamp(result)])


def run(*, budget: float, repeats: int, only: str = "all") -> list[dict[str, Any]]:
    """Runs all rows. The heads come before the peers and leave them at least half of the time."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    suite = Suite(device, budget if only != "all" else budget / 2)
    end = time.perf_counter() + budget
    if only in ("all", "attention"):
        run_attention(suite)
    if only in ("all", "heads"):
        run_heads(suite, repeats=repeats)
    suite.deadline = end
    if only in ("all", "peers"):
        run_peers(suite, repeats=repeats)
    return suite.rows + (not_measured() if device == "cpu" else [])


def main(arguments: list[str] | None = None) -> None:
    """Runs the command that the module's docstring describes."""
    words = sys.argv[1:] if arguments is None else arguments
    parser = results.parser_of(__doc__)
    parser.add_argument("--budget", type=float, default=BUDGET_SECONDS, help="seconds; rows that would not fit are skipped")
    parser.add_argument("--repeats", type=results.positive, default=5)
    parser.add_argument("--only", choices=("all", "attention", "heads", "peers"), default="all")
    parser.add_argument("--commit", help="the commit to report if the tree is not a checkout")
    given = parser.parse_args(words)
    if results.rendered(parser, given, report):
        return
    about = results.facts(results.command_of("benchmarks.gpu_suite", words))
    result = {**about, "commit": about["commit"] or given.commit}
    result["rows"] = run(budget=given.budget, repeats=given.repeats, only=given.only)
    results.conclude(result, report, given.out)


if __name__ == "__main__":
    main()
