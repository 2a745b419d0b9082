"""The GPU suite: every section measures on a CPU with tiny shapes, faults stay in their row, and targets judge what they say.

A GPU changes the shapes, and what only it has: FlexAttention, its allocator's peak, and waits for it.
"""

import json
import math
import os
import subprocess
import sys
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from benchmarks import gpu_engine, gpu_fused, gpu_heads, gpu_kernels, gpu_peers, gpu_suite, gpu_targets, gpu_waits, results
from benchmarks.gpu_attention import SMALL
from benchmarks.gpu_rows import NotMeasuredError, Place, Suite
from benchmarks.gpu_step import PLAIN, Case
from benchmarks.peer_targets import Point, rho
from rec_dist.models.flex import SMALLEST_HEAD
from rec_dist.models.per_prompt import PER_PROMPT
from rec_dist.runtime.world import World

ROOT = Path(__file__).parents[2]
CPU = Place("cpu", tiny=True)
QUICK = ("--repeats", "1", "--budget", "36000")  # few repeats, and time enough on a busy machine


def in_a_process(*words: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs Python as the suite's docstring says, from the root of the checkout."""
    paths = {"PYTHONPATH": "kernels:.", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    return subprocess.run(
        [sys.executable, *words],
        cwd=ROOT,
        env={**os.environ, **paths, **environment},
        capture_output=True,
        text=True,
        check=False,
    )


def read(out: Path) -> dict[str, Any]:
    return json.loads(out.read_text(encoding="utf-8"))


@pytest.mark.slow
def test_every_section_measures_without_a_gpu(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    done = in_a_process("-m", "benchmarks.gpu_suite", "--tiny", *QUICK, "--out", str(out), TRITON_INTERPRET="1")
    assert done.returncode == 0, done.stderr
    result = read(out)
    assert result["finished"] and result["tiny"] and result["device"] == "cpu"
    by_section: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        assert row["device"] == "cpu" and row["tiny"] and row["status"].partition(":")[0] in ("measured", "not measured"), row
        by_section.setdefault(row["section"], []).append(row)
    assert list(by_section) == list(gpu_suite.SECTIONS)
    measured = {name: [row for row in rows if row["status"] == "measured"] for name, rows in by_section.items()}

    (attention,) = measured["attention"]
    assert attention["method"] == f"{PER_PROMPT} against sdpa"
    assert 0 < attention["gradients apart"] < 1e-4 and attention["logps apart"] < 1e-4
    assert [(row["op"], row["rejected"]) for row in measured["kernels"]] == [
        ("completion_logps", 0),
        *(len(gpu_kernels.KINDS) * [("preference_head", 0), ("preference_loss", 0)]),
    ]
    assert {row["results"] for row in measured["kernels"]} == {3, 4}
    assert {row["method"] for row in measured["head"]} >= {"GEMMs alone", "preference_head auto", "torch"}
    assert [row["method"] for row in measured["peers"]] == ["d", "b", "a"]
    deepspeed, plain = measured["engine"]
    assert (deepspeed["engine"], plain["engine"]) == ("DeepSpeed", "plain torch")
    assert deepspeed["loss"] == pytest.approx(plain["loss"], abs=1e-6), "both made the same steps"
    assert [(row["processes"], row["equal"], row["sent"]) for row in measured["loader"]] == [(0, True, True), (1, True, True)]
    (memory,) = measured["memory"]
    assert memory["peak_bytes"] > 0 and memory["planned_bytes"] == sum(memory["parts"].values())
    (compilations,) = measured["compilations"]
    assert len(set(compilations["rows"])) > 3 and compilations["scoring"][-1] == 0
    assert "plain layers" in {row["method"] for row in measured["fused"]}
    assert {row["status"] for row in by_section["waits"]} == {"not measured: only a GPU is waited for"}

    gpu_suite.main(["--markdown", str(out)])
    tables = capsys.readouterr().out
    assert "| tiny LoRA " in tables and tables.index("| target ") < tables.index("| section ")
    assert "did not end" not in tables


@pytest.mark.slow
def test_a_row_that_fails_says_why_and_the_next_one_runs(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fault(self: Any) -> None:
        raise RuntimeError("no memory\nand a long trace")

    monkeypatch.setattr(gpu_heads.HeadCase, "gemms", fault)
    out = tmp_path / "r.json"
    gpu_suite.main(["--only", "head", *QUICK, "--out", str(out)])
    rows = read(out)["rows"]
    assert {row["section"] for row in rows} == {"head"}
    status = {(row["weight"], row["method"]): row["status"] for row in rows}
    assert status["frozen", "GEMMs alone"] == status["trains", "GEMMs alone"] == "failed: RuntimeError: no memory"
    assert set(status.values()) == {"failed: RuntimeError: no memory", "measured"}
    assert "2       0        0" in capsys.readouterr().out.splitlines()[-3], "the short table counts them"


def test_a_section_that_fails_between_its_rows_is_a_row() -> None:
    suite = Suite(CPU, seconds=1000.0)

    def section(suite: Suite) -> None:
        suite.row({"method": "x"}, 0.0, lambda: {"ms": 1})
        raise ValueError("no rows of this kind")

    suite.section("head", 1000.0, section)
    assert [(row["method"], row["status"]) for row in suite.rows] == [
        ("x", "measured"),
        ("all", "failed: ValueError: no rows of this kind"),
    ]


def test_a_run_that_is_killed_keeps_its_rows(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "r.json"
    script = (
        "import os, signal, sys\n"
        "from benchmarks import gpu_heads, gpu_suite\n"
        "gpu_heads.HeadCase.chunked = lambda self: os.kill(os.getpid(), signal.SIGKILL)\n"
        "gpu_suite.main(sys.argv[1:])\n"
    )
    done = in_a_process("-c", script, "--only", "head", *QUICK, "--out", str(out))
    assert done.returncode == -9
    result = read(out)
    assert [row["method"] for row in result["rows"]][-1] == "torch"
    assert {row["status"] for row in result["rows"]} == {"measured"} and not result["finished"]
    gpu_suite.main(["--markdown", str(out)])
    assert "The run did not end" in capsys.readouterr().out


def test_rows_keep_to_their_time_and_say_what_is_missing() -> None:
    suite = Suite(CPU, seconds=1000.0)

    def fail(fault: Exception) -> dict[str, Any]:
        raise fault

    status = lambda fault, seconds=1.0: suite.row({}, seconds, lambda: fail(fault))["status"]
    assert status(RuntimeError("unused"), 6000.0).startswith("skipped: needs about 6000 s")
    assert status(NotMeasuredError("only a GPU has one")) == "not measured: only a GPU has one"
    assert status(ModuleNotFoundError("No module named 'triton'", name="triton")).startswith("not measured: No module")
    assert status(ModuleNotFoundError("No module named 'rec_dist.x'", name="rec_dist.x")).startswith("failed: ")
    assert suite.build({"method": "z"}, 1.0, lambda: 3) == 3
    assert len(suite.rows) == 4, "what was built is no row"


def test_without_deepspeed_the_plain_step_is_measured(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    suite = Suite(CPU, seconds=1000.0, repeats=1)
    suite.section("engine", 1000.0, gpu_engine.run)
    status = {(row["engine"], row["ZeRO"]): row["status"] for row in suite.rows}
    assert status["plain torch", ""] == "measured"
    assert status["DeepSpeed", 0].startswith("not measured: ") and "deepspeed" in status["DeepSpeed", 0]


def test_sections_share_the_time() -> None:
    names, left, spent = list(gpu_suite.SECTIONS), gpu_suite.BUDGET_SECONDS, 0.0
    for number, name in enumerate(names):
        limit = gpu_suite.time_limit(left, name, names[number:], budget=gpu_suite.BUDGET_SECONDS)
        assert limit == pytest.approx(gpu_suite.SECTIONS[name][1] * gpu_suite.BUDGET_SECONDS / 520.0)
        left, spent = left - limit, spent + limit
    assert spent == pytest.approx(gpu_suite.BUDGET_SECONDS)
    assert gpu_suite.time_limit(520.0, "peers", ["peers"], budget=520.0) == 240.0
    assert gpu_suite.time_limit(200.0, "peers", ["peers"], budget=520.0) == 200.0, (
        "what other sections have left is the last one's"
    )


def test_peers_do_not_run_our_fused_adapters() -> None:
    setting, point = gpu_peers.settings(tiny=True)[0], gpu_peers.points(tiny=True)[0]
    shared = gpu_peers.SharedModel(gpu_peers.build_setting(setting, CPU))
    kinds = lambda: {name: type(layer) for name, layer in shared.model.named_modules() if "lm_head" not in name}
    build = lambda method: gpu_peers.build_method(method, shared, setting, point, "cpu")
    built, before = kinds(), build("a").step()
    ours = build("d").step()
    assert kinds() != built, "ours has layers of other classes"
    after = build("a").step()
    assert kinds() == built
    assert not any(getattr(layer, "lora_variant", {}) for layer in shared.model.modules())
    assert after == pytest.approx(before, abs=1e-6) and math.isfinite(ours)


def test_kernels_are_judged() -> None:
    inputs = gpu_kernels.Inputs(CPU, torch.float32)
    leaves = (inputs.hidden, inputs.weight)
    truth, plain, same = gpu_kernels.logps_ops(inputs, "reference")
    assert gpu_kernels.judge((truth, plain, same), leaves) == {"results": 3, "rejected": 0, "why": ""}
    wrong = lambda hidden, weight: [same(hidden, weight)[0] * (1 + 1e-4)]
    found = gpu_kernels.judge((truth, plain, wrong), leaves)
    assert found["rejected"] == 3 and found["why"].startswith("result 0: element ")
    distinct = len(inputs.batch.rows.unique())
    assert distinct < len(inputs.batch.rows), "completions share rows"
    assert 1 in inputs.batch.group_offsets.diff().tolist(), "one group has no negatives"


def test_fused_layers_are_judged() -> None:
    assert gpu_fused.check(CPU, torch.float32, gpu_fused.not_fused)["excess in tolerances"] == 0

    def almost(model: nn.Module) -> None:
        model.get_submodule("model.norm").variance_epsilon *= 100  # type: ignore[operator]

    assert gpu_fused.check(CPU, torch.float32, almost)["excess in tolerances"] > 1


def test_waits_are_counted_by_our_line() -> None:
    ours, elsewhere = ROOT / "rec_dist" / "training" / "loop.py", "/somewhere/site-packages/other/file.py"
    text = "import warnings\n\nwarnings.warn({!r}, stacklevel=1)\n"
    with gpu_waits.counted() as places:
        for _ in range(2):
            exec(compile(text.format(gpu_waits.WARNING), ours, "exec"), {})
        exec(compile(text.format(gpu_waits.WARNING), elsewhere, "exec"), {})
        exec(compile(text.format("something else"), ours, "exec"), {})
    assert places == {"rec_dist/training/loop.py:3": 2, "other/file.py:3": 1}
    with pytest.warns(UserWarning, match="back to normal"):
        warnings.warn("back to normal", stacklevel=1)


def test_waits_of_a_step_are_told_from_those_of_a_micro_batch() -> None:
    few, many = Counter({"loop.py:96": 2, "loop.py:120": 1}), Counter({"loop.py:96": 4, "loop.py:120": 1})
    row = gpu_waits.summary(few, many)
    assert (row["waits"], row["a micro-batch"]) == (3, 1.0)
    assert row["places"] == [
        {"where": "loop.py:120", "waits": 1, "a micro-batch": 0.0},
        {"where": "loop.py:96", "waits": 2, "a micro-batch": 1.0},
    ]


@pytest.mark.slow
def test_a_step_of_several_processes_is_measured() -> None:
    """ZeRO stage 2, two processes with gloo: the global step is twice that of one."""
    case = Case(gpu_engine.cases(tiny=True)[0].setting)
    alone = gpu_engine.measure(Case(case.setting, PLAIN), CPU, World(), repeats=1)
    both = gpu_engine.measure_several(case, CPU, 2, repeats=1, zero_stage=2)
    assert (both["GPUs"], both["tokens"], both["groups"]) == (2, 2 * alone["tokens"], 2 * alone["groups"])
    assert math.isfinite(both["loss"]) and both["milliseconds"]["median"] > 0


def test_flops_of_a_step_follow_the_tokens() -> None:
    setting, point = gpu_peers.settings(tiny=False)[0], Point(512, 8, 15, 1)
    per_group = {
        m: gpu_peers.step_flops(m, setting, point) / gpu_peers.groups_of(m, point, setting.micro_batch) for m in ("a", "b", "d")
    }
    assert per_group["b"] / per_group["d"] == pytest.approx(rho(512, 8, 15), rel=0.1)
    assert per_group["a"] / per_group["b"] == pytest.approx(1.5, rel=0.15)  # the reference forward, and the head on every row


def gpu_rows() -> list[dict[str, Any]]:
    """Rows as a GPU would leave them, with numbers that meet some targets."""
    head = {"section": "head", "device": "cuda:0", "V": 128256, "M": 4096, "weight": "frozen", "status": "measured"}
    measured = {
        "preference_head auto": (9.0, 50),
        "torch": (20.0, 1000),
        "torch, chunked and recomputed": (10.0, 250),
        "GEMM alone, forward": (3.0, 1),
        "completion_logps auto, forward": (4.0, 1),
    }
    other = {"device": "cuda:0", "status": "measured"}
    return [
        *({**head, "method": name, "milliseconds": {"median": ms}, "peak_bytes": peak} for name, (ms, peak) in measured.items()),
        {**other, "section": "peers", "model": "8B LoRA", "P": 512, "K": 3, "method": "d", "mfu": 0.5},
        {**other, "section": "kernels", "rejected": 0},
        {**other, "section": "kernels", "rejected": 2},
        {**other, "section": "memory", "planned / measured": 1.1},
        {**other, "section": "memory", "planned / measured": 0.9},
        {**other, "section": "waits", "engine": "DeepSpeed", "a micro-batch": 0.0},
    ]


def test_targets_are_judged_by_the_rows_of_a_gpu() -> None:
    rows = gpu_rows()
    found = {verdict.claim: (verdict.value, verdict.verdict) for verdict in gpu_targets.verdicts(rows)}
    where = "V=128,256 M=4,096"
    assert found[f"preference_head / chunked torch, time, {where}"] == (0.9, "met")
    assert found[f"preference_head / full torch, peak memory, {where}"] == (0.05, "met")
    assert found[f"completion_logps forward, of the speed of its GEMM, {where}"] == (0.75, "not met")
    assert found["MFU of 8B LoRA, P=512 K=3"] == (0.5, "met")
    assert found["MFU of 8B LoRA, P=512 K=15"] == (None, "not measured")
    assert found["kernels, results that the rule of acceptance rejects"] == (2, "not met")
    assert found["planned / measured memory, smallest"] == (0.9, "not met")
    assert found["planned / measured memory, largest"] == (1.1, "met")
    assert found["waits for the GPU that a further micro-batch adds"] == (0.0, "met")


@pytest.mark.parametrize("change", [{"device": "cpu"}, {"tiny": True}], ids=str)
def test_rows_that_only_check_the_script_meet_no_target(change: dict[str, Any]) -> None:
    rows = [{**row, **change} for row in gpu_rows()]
    assert {verdict.verdict for verdict in gpu_targets.verdicts(rows)} == {"not measured"}


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--only", "heads"], "invalid choice: 'heads'"),
        (["--device", "cuda:0"], "torch sees no GPU"),
        (["--repeats", "0"], "not a whole number of 1 or more"),
    ],
    ids=str,
)
def test_arguments_that_cannot_be(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        gpu_suite.main(words)
    assert ended.value.code == 2 and says in capsys.readouterr().err


def test_the_settings_on_a_gpu_are_what_the_page_says() -> None:
    """docs/performance.md names them, and no CPU runs them."""
    assert {(case.vocab, case.scored) for case in gpu_heads.cases(tiny=False)} == {
        (vocab, scored) for vocab in (32000, 128256, 152064) for scored in (4096, 16384)
    }
    assert {case.setting.name for case in gpu_engine.cases(tiny=False)} == {"8B LoRA", "1B LoRA"}
    assert gpu_peers.LLAMA_8B.num_weights == pytest.approx(8.03e9, rel=0.01)
    assert gpu_peers.LLAMA_1B.num_weights == pytest.approx(1.24e9, rel=0.01)
    assert SMALL.hidden // SMALL.heads == SMALLEST_HEAD
    assert Place("cuda:0", tiny=True).dtype == torch.bfloat16 and results.positive("3") == 3
