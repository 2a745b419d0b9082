"""launchers/grafana.json and what a run exports name the same metrics. What arrives: tests/distributed/test_gauges.py."""

import json
import re
from pathlib import Path
from typing import Any

import pytest

from rec_dist.launch.ray_metrics import EXPORTED, MEASURES

DASHBOARD = json.loads((Path(__file__).resolve().parents[2] / "launchers" / "grafana.json").read_text(encoding="utf-8"))
ROW: dict[str, Any] = {
    "event": "step",
    "step": 7,
    "epoch": 0,
    "loss": 0.5,
    "grad_norm": 1.5,
    "lr": 1e-4,
    "rewards/margins": 0.25,
    "tokens": 100,
    "logical_tokens": 200,
    "groups": 6,
    "tokens_per_second": 50.0,
    "step_seconds": 2.0,
    "data_seconds": 0.125,
    "mfu": 0.4,
    "restarts": 1,
    "workers": 2,
}


def queries() -> dict[str, list[str]]:
    return {panel["title"]: [target["expr"] for target in panel["targets"]] for panel in DASHBOARD["panels"]}


def names(expression: str) -> set[str]:
    return set(re.findall(r"\bray_\w+", expression))


@pytest.mark.parametrize("title", sorted(queries()))
def test_every_panel_asks_for_what_a_run_exports(title: str) -> None:
    for expression in queries()[title]:
        assert names(expression), expression
        assert names(expression) <= set(EXPORTED), expression


def test_every_exported_metric_has_a_panel() -> None:
    asked = {name for expressions in queries().values() for expression in expressions for name in names(expression)}
    assert asked == set(EXPORTED)


def test_the_variable_of_the_dashboard_is_a_label_that_a_run_sets() -> None:
    variable = next(entry for entry in DASHBOARD["templating"]["list"] if entry["name"] == "run")
    assert variable["query"] == f"label_values({EXPORTED[0]}, run)"
    assert all('{run=~"$run"}' in expression for expressions in queries().values() for expression in expressions)


def test_panels_lie_side_by_side() -> None:
    taken: set[tuple[int, int]] = set()
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        cells = {(x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])}
        assert not cells & taken
        assert max(x for x, _ in cells) < 24
        taken |= cells
    assert len({panel["id"] for panel in DASHBOARD["panels"]}) == len(DASHBOARD["panels"])


def test_a_gauge_is_worked_out_from_a_row_as_trackers_get_it() -> None:
    found = {measure.name: measure.value(ROW) for measure in MEASURES}
    assert found == {
        "step": 7,
        "loss": 0.5,
        "reward_margin": 0.25,
        "gradient_norm": 1.5,
        "tokens_per_second": 50.0,
        "groups_per_second": 3.0,
        "mfu": 0.4,
        "step_seconds": 2.0,
        "data_wait_seconds": 0.125,
        "restarts": 1,
        "workers": 2,
    }
    without = {name: value for name, value in ROW.items() if name != "rewards/margins"} | {"mfu": None}
    assert [measure.name for measure in MEASURES if measure.value(without) is None] == ["reward_margin", "mfu"]
