"""The report: what it reads from a run directory, what it claims, and that its page is self-contained."""

import json
import math
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec_dist.config.pipeline_schema import CurvesConfig, PointConfig
from rec_dist.errors import UserError
from rec_dist.report.findings import findings
from rec_dist.report.plots import loss_curves, metric_curves, model_colors
from rec_dist.report.table import ComparisonRow, Difference
from rec_dist.report.write import Report, RunSummary, StageSummary, read_run, share_bars, write_report

VOID = {"meta", "br", "hr", "img", "link", "input"}


class Page(HTMLParser):
    """Collects the text, the ids and every attribute that could fetch something, and checks that tags are closed."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.ids, self.targets, self.tags, self.open = [], [], [], set(), []
        self.feed(html)
        assert not self.open

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        if tag not in VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in {"href", "src", "xlink:href", "data", "action", "srcset"}:
                self.targets.append(value)
            elif name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in VOID:
            self.open.pop()

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def interval(value: float, half: float = 0.02, n: int = 900) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def row(name: str, value: float) -> ComparisonRow:
    return ComparisonRow(name, {"hr@1": interval(value), "ndcg@10": interval(value * 1.4)}, 1_000_000, 60.0)


def steps(count: int, rewards: bool) -> dict[str, np.ndarray]:
    index = np.arange(1, count + 1, dtype=np.float64)
    columns = {"step": index, "loss": 1 / index}
    if rewards:
        for key in ("chosen", "rejected", "margins", "accuracies"):
            columns[f"rewards/{key}"] = np.linspace(0, 1, count)
    return columns


@pytest.fixture
def report() -> Report:
    return Report(
        title="DMPO & <script>alert(1)</script>",
        summary=["20 candidates a user."],
        rows=[row("base", 0.06), row("sft", 0.25), row("dmpo $x$ <b>", 0.3418)],
        differences=[
            Difference("dmpo $x$ <b>", "sft", "hr@1", interval(0.092, 0.01)),
            Difference("dmpo $x$ <b>", "base", "hr@1", interval(0.282, 0.01)),
            Difference("sft", "base", "hr@1", interval(0.19, 0.3)),
        ],
        stages=[StageSummary("sft", "rec-dist train a.yaml", 61.0, 10, "out/sft"), StageSummary("prepare", "x", 0.0)],
        runs=[
            RunSummary("sft", steps(40, False), "a: <1>", {"commit": "abc", "hashes": {"data": "d1"}}),
            RunSummary("推荐", steps(1000, True), "b: 2", {"commit": "abc", "hashes": {"data": "d2"}}),
        ],
        data_facts={"users": 943, "titles": {"missing": math.nan}},
        commands=["rec-dist run a.yaml"],
        num_candidates=20,
    )


def written(report: Report, folder: Path) -> str:
    path = folder / "report.html"
    write_report(path, report)
    assert [entry.name for entry in folder.iterdir()] == ["report.html"]
    return path.read_text(encoding="utf-8")


def test_the_page_stands_alone(report: Report, tmp_path: Path) -> None:
    html = written(report, tmp_path)
    page = Page(html)
    assert all(target is not None and target.startswith("#") for target in page.targets)
    assert {target[1:] for target in page.targets} <= set(page.ids)
    assert len(page.ids) == len(set(page.ids))
    assert not page.tags & {"script", "link", "img", "iframe", "object", "embed", "base"}
    assert "http://" not in html
    assert "https://" not in html
    assert "@import" not in html
    assert all(target.startswith("#") for target in re.findall(r"url\(([^)]*)\)", html))
    assert re.search(r"\bnan\b|\binf\b", html, re.IGNORECASE) is None


def test_everything_reported_is_on_the_page(report: Report, tmp_path: Path) -> None:
    text = " ".join(Page(written(report, tmp_path)).text)
    for words in ("0.060", "0.250", "0.342", "[0.322, 0.362]", "+0.092 [+0.082, +0.102]", "above 0", "no significant difference"):
        assert words in text
    for words in ("dmpo $x$ <b>", "DMPO & <script>alert(1)</script>", "推荐", "a: <1>", "rec-dist run a.yaml"):
        assert words in text
    for words in ("own tokens own time", "add both rows", "those of the evaluation alone"):
        assert words in text
    for words in ("n = 900 users", "chance 0.050", "1 m 01 s", "hashes.data", "d1", "d2", "943"):
        assert words in text


def test_the_same_report_gives_the_same_bytes(report: Report, tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    assert written(report, tmp_path / "a") == written(report, tmp_path / "b")


def test_shares_have_a_panel_an_ensemble_and_bars_on_both_sides_of_zero() -> None:
    shares = [
        Difference("both", f"both without {member}", metric, interval(value, 0.004))
        for member, value in (("sasrec", 0.012), ("text without end", -0.006))
        for metric in ("hr@10", "ndcg@10")
    ]
    shares.append(Difference("one", "one without sasrec", "ndcg@10", interval(0.003, 0.004)))
    drawing = share_bars(shares, {})
    for words in ("both", "one", "sasrec", "text without end", "0.012", "-0.006", "0.003"):
        assert f">{words}</text>" in drawing or f">{words.replace('-', chr(0x2212))}</text>" in drawing, words
    assert drawing.count(">0.003<") == 1 and "shares-" in drawing
    assert share_bars([], {}) == ""


def test_a_metric_is_drawn_against_a_number(report: Report, tmp_path: Path) -> None:
    assert metric_curves(report.rows, None) == ""
    points = [PointConfig(line="DMPO", x=x, row=name) for x, name in ((7.0, "sft"), (1.0, "base"))]
    curves = CurvesConfig(axis="negatives (K)", points=points)
    drawn = metric_curves(report.rows, curves)
    text = re.sub(r"<[^>]*>", " ", drawn)
    assert all(words in text for words in ("hr@1", "ndcg@10", "negatives (K)", "DMPO"))
    reversed_points = CurvesConfig(axis="negatives (K)", points=points[::-1])
    assert metric_curves(report.rows, reversed_points) == drawn  # a line goes from left to right
    assert "negatives (K)" in " ".join(Page(written(replace(report, curves=curves), tmp_path)).text)


def test_an_almost_empty_report_is_a_page(tmp_path: Path) -> None:
    page = Page(written(Report("Nothing yet"), tmp_path))
    assert "No model was evaluated." in page.text
    assert "training" not in page.ids


def test_one_model_is_compared_with_nothing(tmp_path: Path) -> None:
    report = Report("One", rows=[row("only", 0.05)], num_candidates=20)
    lead, chance = findings(report.rows, report.differences, report.num_candidates)
    assert lead == "only reaches hr@1 0.050 [0.030, 0.070] over 900 users; it was compared with no other model."
    assert chance == "A random order of 20 candidates has an expected hr@1 of 0.050; not shown to be better: only."
    Page(written(report, tmp_path))


def test_findings_claim_only_what_intervals_allow(report: Report) -> None:
    lead, *evidence = findings(report.rows, report.differences, report.num_candidates)
    assert lead.startswith("dmpo $x$ <b> beats sft by 0.092 [0.082, 0.102] and base by 0.282")
    assert any("Among the others, no significant difference: sft minus base" in line for line in evidence)
    assert any(line.endswith("not shown to be better: base.") for line in evidence)


def test_findings_do_not_hide_a_metric_that_disagrees() -> None:
    pairs = [Difference("b", "a", "hr@1", interval(0.1)), Difference("b", "a", "ndcg@10", interval(0.01))]
    rows = [row("a", 0.2), row("b", 0.3)]
    disagreeing = [line for line in findings(rows, pairs) if line.startswith("ndcg@10")]
    assert len(disagreeing) == 1
    for words in ("b minus a", "no significant difference", "+0.010 [-0.010, +0.030]"):
        assert words in disagreeing[0]
    unmeasured = findings(rows, [])
    assert unmeasured[0].endswith("its difference to a was not measured.")


def write_run(folder: Path, lines: list[str], **files: str) -> Path:
    (folder / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8")
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text, encoding="utf-8")
    return folder


def step(number: int, **values: Any) -> str:
    return json.dumps({"event": "step", "step": number, **values})


def test_a_resumed_run_is_one_trajectory(tmp_path: Path) -> None:
    lines = [step(number, loss=9.0) for number in (1, 2, 3, 4, 5)]
    lines += [json.dumps({"event": "resume", "step": 2}), step(3, loss=1.0), step(3, loss=0.5)]
    run = read_run(write_run(tmp_path, lines))
    assert run.name == tmp_path.name
    assert run.steps["step"].tolist() == [1, 2, 3]
    assert run.steps["loss"].tolist() == [9.0, 9.0, 0.5]


def test_torn_and_unknown_lines_are_tolerated_and_counted(tmp_path: Path) -> None:
    lines = [step(1, loss=2.0), json.dumps({"event": "surprise", "x": [1]}), "", "[1]"]
    run = read_run(write_run(tmp_path, [*lines, '{"event": "step", "step": 2, "lo']), name="m")
    assert run.steps["step"].tolist() == [1]
    assert run.unreadable_lines == 2


def test_missing_rewards_are_gaps_or_absent(tmp_path: Path) -> None:
    lines = [step(1, loss=1.0), step(2, loss=float("nan"), **{"rewards/margins": 0.5}), step(3, loss=None)]
    columns = read_run(write_run(tmp_path, lines)).steps
    assert "rewards/chosen" not in columns
    np.testing.assert_array_equal(columns["rewards/margins"], [math.nan, 0.5, math.nan])
    np.testing.assert_array_equal(columns["loss"], [1.0, math.nan, math.nan])
    (tmp_path / "page").mkdir()
    html = written(Report("gaps", runs=[RunSummary("r", columns)]), tmp_path / "page")
    assert re.search(r"\bnan\b", html, re.IGNORECASE) is None


def test_config_and_environment_are_read(tmp_path: Path) -> None:
    folder = write_run(tmp_path, [], config__yaml="task: {kind: dmpo}\n", environment__json='{"commit": "abc"}')
    run = read_run(folder)
    assert (run.config_text, run.environment, run.steps) == ("task: {kind: dmpo}\n", {"commit": "abc"}, {})
    (tmp_path / "environment.json").write_text("{", encoding="utf-8")
    with pytest.raises(UserError, match=r"environment\.json is not a JSON object"):
        read_run(folder)


def test_a_folder_without_metrics_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no metrics\.jsonl"):
        read_run(tmp_path)


def test_long_curves_are_thinned_but_keep_their_spikes() -> None:
    columns = steps(200_000, False)
    columns["loss"] = np.ones(200_000)
    columns["loss"][123_456] = 7.0
    svg = loss_curves({"run": columns}, model_colors(["run"]))
    assert len(svg) < 40_000
    assert ">7" in svg or ">6" in svg  # the axis reaches the spike
