"""The benchmarks measure what they say: ratios, targets, tables and files, and the same loss from every method."""

import json
import subprocess
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import catalogue_search, chaos, checkpoint, gpu_suite, loader, peers, prepare, results, resume, startup
from benchmarks.peer_methods import END, TIMELINE, TINY, Shape, build, build_model, make_case, timeline
from benchmarks.peer_targets import Point, Verdict, ratio, rho, verdicts


def row(prompt: int, negatives: int, method: str, speed: float, peak: int = 100) -> dict[str, Any]:
    about = {"prompt": prompt, "completion": 8, "negatives": negatives, "method": method}
    return {**about, "groups": 2, "groups_per_second": speed, "peak_bytes": peak}


def test_rho_counts_tokens() -> None:
    assert rho(512, 8, 3) == 4 * 520 / (512 + 32)
    assert rho(100, 8, 0) == 1.0
    assert rho(512, 10, 15) == pytest.approx(12.4, abs=0.05)


def test_targets_are_judged_by_what_was_measured() -> None:
    rows = [
        row(512, 1, "b", 1.0),
        row(512, 1, "d", 0.96 * rho(512, 8, 1), peak=100),
        row(512, 1, "c-best", 1.0),
        row(512, 3, "b", 1.0),
        row(512, 3, "d", 0.94 * rho(512, 8, 3)),
        row(512, 3, "e", 10.0),
        row(512, 15, "d", 3.0, peak=131),
    ]
    found = {verdict.claim: verdict for verdict in verdicts(rows)}
    assert found["d/b over rho, P=512 K=1"].verdict == "met"
    assert found["d/b over rho, P=512 K=3"].verdict == "not met"
    assert found["d/b over rho, P=512 K=3"].value == pytest.approx(0.94)
    assert found["d/b over rho, P=512 K=15"].verdict == "not measured"
    assert found["d / c-best, P=512 K=1"].verdict == "not met"
    assert found["d / c-default, P=512 K=1"].verdict == "not measured"
    assert found["d: seconds a group, K=15 over K=3, P=512"].value == pytest.approx(0.94 * rho(512, 8, 3) / 3.0)
    assert found["e / d, 10 targets a prompt, P=512 K=3"].verdict == "met"
    assert found["d: peak memory, K=15 over K=1, P=512"].row() == {
        "target": "d: peak memory, K=15 over K=1, P=512",
        "limit": "<= 1.3",
        "measured": 1.31,
        "verdict": "not met",
    }
    assert ratio({}, (1, 1, "d"), (1, 1, "b")) is None
    assert Verdict("x", 2.0, 2.0).verdict == Verdict("x", 2.0, 2.0, at_least=False).verdict == "met"


def test_tables_are_aligned_and_render_as_markdown() -> None:
    rows = [{"name": "a", "value": 1234.5}, {"name": "longer", "value": None}, {"name": "b", "value": 0.5}]
    lines = results.table(rows).splitlines()
    assert lines == ["name    value", "a       1,234", "longer  -", "b       0.5"]
    assert results.table(rows, markdown=True).splitlines()[1] == "| ------ | ----- |"
    assert results.table([]) == "(no rows)"


def test_result_files_say_where_and_when(tmp_path: Path) -> None:
    command = results.command_of(
        "benchmarks.peers", ["--points", "20:1", "--out", "/somewhere/else.json", "--shape", '{"layers": 2}']
    )
    assert command == "python -m benchmarks.peers --points 20:1 --shape '{\"layers\": 2}'"
    results.write(tmp_path / "r.json", results.facts(command, rows=[]))
    read = json.loads((tmp_path / "r.json").read_text())
    assert set(read) == {"date", "commit", "machine", "versions", "command", "rows"}
    assert command in results.stamp(read)
    assert ", commit 012345678, " in results.stamp({**read, "commit": "0123456789abcdef"})
    assert ", commit 012345678+changes, " in results.stamp({**read, "commit": "0123456789abcdef+changes"})
    assert results.spread([3.0, 1.0, 2.0]) == {"median": 2.0, "low": 1.0, "high": 3.0, "n": 3}


def losses(method: str, point: Point) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and adapter gradients of a fresh model."""
    model = build_model(TINY)
    runner = build(method, model, point, TINY.vocab)
    loss = runner.step()
    named = model.get_base_model() if hasattr(model, "get_base_model") else model
    return loss, {name: p.grad for name, p in named.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("negatives", [1, 3])
def test_all_methods_do_the_same_work(negatives: int) -> None:
    point = Point(20, 5, negatives, 2)
    found = {method: losses(method, point) for method in ("a", "b", "d")}
    for method in ("a", "b"):
        assert found[method][0] == pytest.approx(found["d"][0], abs=1e-5)
        assert set(found[method][1]) == set(found["d"][1])
        assert all(torch.allclose(found[method][1][name], grad, atol=1e-4) for name, grad in found["d"][1].items())
    assert abs(found["d"][0] - torch.tensor(1.0 + negatives).log()) > 1e-3  # the adapter moves it off its value at the start


def test_a_timeline_does_the_work_of_its_targets_alone() -> None:
    point = Point(20, 5, 3, 1)
    assert losses("e", point)[0] == pytest.approx(losses("e-apart", point)[0], abs=1e-5)
    targets = timeline(point, TINY.vocab)
    assert len(targets) == TIMELINE
    runner = build("e", build_model(TINY), point, TINY.vocab)
    prompt = 20 + 9 * 5
    assert runner.num_tokens == prompt + (TIMELINE * 3 + 1) * 4  # of the chosen ones the last alone needs rows
    assert runner.groups == TIMELINE


def test_cases_are_the_same_in_every_process_and_end_as_one_ends() -> None:
    left, right = make_case(Point(9, 4, 2, 3), 50), make_case(Point(9, 4, 2, 3), 50)
    assert torch.equal(left.prompts, right.prompts)
    assert torch.equal(left.completions, right.completions)
    assert (left.completions[:, :, -1] == END).all()
    assert (left.completions[:, :, :-1] != END).all()


def test_losses_that_differ_stop_the_comparison() -> None:
    point = Point(20, 8, 1, 1)
    peers.check_losses(point, {"b": {"loss": 0.5}, "d": {"loss": 0.50001}, "a": {"error": "x"}})
    with pytest.raises(SystemExit, match=r"P=20 K=1: .*\bb \(0.5"):
        peers.check_losses(point, {"b": {"loss": 0.5}, "d": {"loss": 0.51}})


@pytest.mark.slow
def test_the_comparison_runs_from_end_to_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocab": 320}
    out = tmp_path / "r.json"
    words = ["--points", "20:3:2", "--threads", "1", "--repeats", "1", "--methods", "a,b,d,e", "--shape", json.dumps(shape)]
    peers.main([*words, "--out", str(out)])
    printed = capsys.readouterr().out
    result = json.loads(out.read_text())
    assert [row["method"] for row in result["rows"]] == ["a", "b", "d", "e"]
    assert all(row["peak_bytes"] >= 0 and row["groups_per_second"] > 0 for row in result["rows"])
    assert "d/b over rho, P=20 K=3" in printed
    peers.main(["--markdown", str(out)])
    assert "| 20 | 3 | d " in capsys.readouterr().out


def test_the_loader_benchmark_counts_its_tokens() -> None:
    result = loader.run(None, steps=1, repeats=1, negatives=3, sizes={"users": 300, "items": 120, "positives": 9000})
    assert len(result["rows"]) == len(loader.CASES)
    assert all(row["groups"] > 0 and row["tokens_per_second"] > 0 for row in result["rows"])
    report = loader.report({**results.facts("python -m benchmarks.loader"), **result})
    assert "packed tokens a second on one core" in report


@pytest.mark.slow
def test_the_cost_of_a_checkpoint_is_measured_from_end_to_end(tmp_path: Path) -> None:
    """In a process of its own: it joins a group of workers."""
    shape = {"hidden": 32, "layers": 2, "heads": 4, "kv_heads": 2, "intermediate": 64, "vocab": 320}
    out = tmp_path / "r.json"
    words = ["--repeats", "2", "--tokens", "40", "--shape", json.dumps(shape), "--folder", str(tmp_path), "--out", str(out)]
    with results.run_apart("benchmarks.checkpoint", words) as child:
        assert child.wait(180) == 0
    rows = json.loads(out.read_text())["rows"]
    assert [(row["trains"], row["mode"]) for row in rows] == [
        (what, mode) for what in ("LoRA r8", "all weights") for mode in ("foreground", "background")
    ]
    for row in rows:
        assert row["bytes"] == 12 * row["weights"] + 4
        assert row["stall_seconds"]["n"] == row["write_seconds"]["n"] == 2
        assert row["steps_meanwhile"] == 0 or row["mode"] == "background"
        assert 0 < row["stall_seconds"]["low"] <= row["write_seconds"]["high"]
    assert list(tmp_path.iterdir()) == [out]
    assert "| LoRA r8 " in checkpoint.report(json.loads(out.read_text()), markdown=True)


def test_goodput_counts_repeated_steps_and_lost_time() -> None:
    """100 useful steps of 2 s in 400 s are half the time; 25 were done twice."""
    faults = [
        {"target": "worker", "signal": "SIGKILL", "seconds": 20.0},
        {"target": "worker", "signal": "SIGKILL", "seconds": 30.0},
        {"target": "driver", "signal": "SIGTERM", "seconds": 40.0},
    ]
    measured = {
        "faults": faults,
        "seconds": 400.0,
        "steps": 100,
        "steps_executed": 125,
        "undisturbed_step_seconds": 2.0,
        "same": True,
    }
    text = chaos.report({**results.facts("python -m benchmarks.chaos"), **measured}, markdown=True)
    lines = [[cell.strip() for cell in line.strip("|").split("|")] for line in text.splitlines() if line.startswith("|")]
    totals = dict(zip(lines[0], lines[2], strict=True))
    assert (totals["useful / executed"], totals["goodput in time"], totals["restart s, p50"]) == ("80.0%", "50.0%", "30")
    assert totals["same result"] == "yes, bit for bit"
    assert ["SIGKILL to a worker", "2", "25", "30"] in lines
    assert "NO" in chaos.report({**results.facts(""), **measured, "same": False})


def test_the_resume_benchmark_measures_the_position_it_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resume, "POSITIONS", (1, 50_000))
    result = resume.run(repeats=1, sizes={"users": 300, "items": 120, "positives": 9000})
    assert [(row["group"], row["epoch"]) for row in result["rows"][:2]] == [(1, 0), (50_000, 49_999 // result["examples"])]
    assert "seconds at group 50,000 over group 1, whole epoch" in resume.report({**results.facts("python -m x"), **result})


def test_the_prepare_benchmark_measures_a_run_and_its_children(tmp_path) -> None:
    result = prepare.run([3000], "disk", tmp_path)
    (row,) = result["rows"]
    assert row["counts"]["raw_rows"] == 3000
    assert row["seconds"] > 0.1
    assert row["peak_bytes"] > 50e6, "an interpreter with numpy and pyarrow takes more"
    assert list(tmp_path.iterdir()) == []
    larger = {**row, "rows": 50_000_000, "seconds": 1500.0, "peak_bytes": 7e9}
    verdicts = prepare.verdicts([row, larger])
    assert [verdict.verdict for verdict in verdicts] == ["met", "met", "not met", "met"]
    assert "minutes for 50,000,000 rows" in prepare.report({**results.facts("x"), "rows": [row, larger]})


def test_descendants_are_found_and_memory_is_theirs() -> None:
    command = "import subprocess, sys; subprocess.run([sys.executable, '-c', 'x = bytearray(80_000_000); input()'])"
    process = subprocess.Popen([sys.executable, "-c", command], stdin=subprocess.PIPE)
    try:
        deadline = time.monotonic() + 60
        while prepare.resident_bytes(prepare.tree(process.pid)) < 80e6 and time.monotonic() < deadline:
            time.sleep(0.05)
        assert len(prepare.tree(process.pid)) == 2
        assert prepare.resident_bytes(prepare.tree(process.pid)) > 80e6
        assert prepare.resident_bytes([process.pid]) < 60e6
    finally:
        process.communicate(b"\n", timeout=60)


def refused(module: Any, words: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    """The one line with which a benchmark rejects its arguments before it measures."""
    with pytest.raises(SystemExit) as ended:
        module.main(words)
    printed = capsys.readouterr()
    line = printed.err.splitlines()[-1]
    assert ended.value.code == 2
    assert ": error: " in line and printed.err.count("error: ") == 1 and printed.out == ""
    return line


def test_the_startup_benchmark_times_a_command_and_reports_a_failed_one() -> None:
    wall, cpu = startup.once(["--help"])
    assert 0 < cpu < 5 and wall > 0
    with pytest.raises(SystemExit, match="ended with 2"):
        startup.once(["plan"])
    row = {"command": "x", "limit": 3.0, "wall": results.spread([1.0, 2.0, 9.0]), "cpu": results.spread([1.0])}
    assert "2.00 [1.00, 9.00]" in startup.report({**results.facts("python -m x"), "rows": [row]})


@pytest.mark.parametrize("module", [chaos, checkpoint, gpu_suite, loader, peers, prepare, resume, startup])
def test_a_result_file_that_cannot_be_read_is_the_users_mistake(
    module: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "r.json"
    assert "not a result file" in refused(module, ["--markdown", str(file)], capsys)
    whole = results.facts("python -m x")
    for value in ([1], {}, {**whole, "rows": [{"of": "another benchmark"}]}):
        file.write_text(json.dumps(value), encoding="utf-8")
        assert "not a result file" in refused(module, ["--markdown", str(file)], capsys)
    assert "cannot be written" in refused(module, ["--out", str(tmp_path / "missing" / "r.json")], capsys)
    assert "cannot be written" in refused(module, ["--out", str(tmp_path)], capsys)


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["--points", "100"], "'100' is not P:K or P:K:G in whole numbers"),
        (["--points", "100:x"], "'100:x' is not P:K"),
        (["--points", "100:3,"], "'' is not P:K"),
        (["--points", "0:3"], "each 1 or more"),
        (["--points", "100:0"], "each 1 or more"),
        (["--points", "100:3:1:1"], "is not P:K or P:K:G"),
        (["--points", "100:3:1,100:3:2"], "twice"),
        (["--methods", "d,f"], "'f' is not one of a, b, c-default"),
        (["--methods", ""], "'' is not one of"),
        (["--threads", "0"], "'0' is not a whole number of 1 or more"),
        (["--repeats", "-1"], "'-1' is not a whole number of 1 or more"),
        (["--shape", "{"], "is not JSON"),
        (["--shape", "[]"], "is not an object"),
        (["--shape", '{"layer": 2}'], "has layer; give an object with some of hidden, layers"),
        (["--shape", '{"layers": "two"}'], "layers must be a whole number"),
        (["--shape", '{"layers": true}'], "layers must be a whole number"),
        (["--shape", '{"heads": 7}'], "hidden must be a multiple of 2 * heads"),
        (["--quick", "--full"], "not allowed with"),
        (["--resume"], "--resume needs --out"),
        (["--batch", "3"], "unrecognized arguments"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_arguments_of_the_comparison_that_cannot_be(words: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert says in refused(peers, words, capsys)


def test_a_comparison_goes_on_only_with_what_was_measured_the_same_way(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "r.json"
    words = ["--points", "20:3:2", "--threads", "1", "--methods", "d", "--resume", "--out", str(out)]
    same = {"shape": asdict(Shape()), "threads": 1, "methods": ["d"], "notes": []}
    whole = {**results.facts("python -m x"), **same, "rows": [row(20, 3, "d", 1.0)]}
    whole["rows"][0]["tokens"] = 1
    for name, value in (
        ("commit", "0123"),
        ("machine", {**whole["machine"], "cpu": "another"}),
        ("versions", {**whole["versions"], "torch": "1.0"}),
        ("shape", {**whole["shape"], "layers": 2}),
        ("threads", 2),
        ("methods", ["d", "b"]),
    ):
        results.write(out, {**whole, name: value})
        before = out.read_bytes()
        assert f"has another {name} (" in refused(peers, words, capsys)
        assert out.read_bytes() == before
    results.write(out, {**whole, "rows": [{**whole["rows"][0], "groups": 3}]})
    assert "has 3 groups at P=20 K=3" in refused(peers, words, capsys)
    for text in ("", json.dumps(whole)[:200], "[]", json.dumps({**whole, "rows": [3]}), json.dumps({**whole, "rows": None})):
        out.write_text(text, encoding="utf-8")
        assert "cannot be continued" in refused(peers, words, capsys)
    results.write(out, whole)
    peers.main(words)  # nothing is left to measure
    assert "d/b over rho, P=20 K=3" in capsys.readouterr().out


def test_a_search_is_measured_against_scoring_every_title(tiny_config: Any, tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps(tiny_config(tmp_path / "run")), encoding="utf-8")
    rows = catalogue_search.measure(str(config), (), ["raw", "trie"], 3, 1)
    assert [(row["score"], row["way"]) for row in rows] == [
        (score, way) for score in ("raw", "trie") for way in ("exact", "all", "beam 10", "beam 50")
    ]
    for exact, whole, *beams in (rows[:4], rows[4:]):
        assert len(whole["seconds"]) == 1 and len(exact["seconds"]) == 3 and exact["certified"] == 1.0
        assert max(exact["rows"]) <= whole["rows"][0]
        assert all(0 <= beam["lost"] <= beam["users_hit"] <= 1 for beam in beams)
    table = catalogue_search.report({**results.facts("command"), "rows": rows})
    assert "beam 50" in table and "users hit" in table
