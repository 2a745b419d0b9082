"""The comparison as text: its marks and claims, and that it fits a terminal."""

import math
from dataclasses import replace

import pytest

from rec_dist.config.pipeline_schema import PublishedRow
from rec_dist.report.findings import claim, findings
from rec_dist.report.numbers import chance_level, format_count, format_interval, format_seconds
from rec_dist.report.table import ComparisonRow, Difference, best_names, user_range
from rec_dist.report.text_table import text_table

METRICS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")


def interval(value: float, half: float = 0.02, n: int = 900) -> dict[str, float]:
    return {"value": value, "low": value - half, "high": value + half, "n": n}


def row(name: str, value: float, n: int = 900) -> ComparisonRow:
    return ComparisonRow(name, {metric: interval(value, n=n) for metric in METRICS}, 12_345_678, 3725.0)


@pytest.mark.parametrize(
    ("low", "high", "verdict"),
    [
        (0.001, 0.02, "above 0"),
        (-0.02, -0.001, "below 0"),
        (-0.01, 0.01, "no significant difference"),
        (0.0, 0.02, "no significant difference"),
        (math.nan, math.nan, "no significant difference"),
    ],
)
def test_a_verdict_needs_an_interval_that_excludes_zero(low: float, high: float, verdict: str) -> None:
    difference = Difference("a", "b", "hr@1", {"value": (low + high) / 2, "low": low, "high": high, "n": 9})
    assert difference.verdict == verdict
    assert verdict in text_table([row("a", 0.5), row("b", 0.4)], [difference])


def test_a_difference_seen_from_the_other_side_changes_sign_and_verdict() -> None:
    difference = Difference("a", "b", "hr@1", {"value": -0.02, "low": -0.03, "high": -0.01, "n": 9})
    other = difference.seen_from("b")
    assert (other.better, other.worse, other.verdict) == ("b", "a", "above 0")
    assert other.amount == "+0.020 [+0.010, +0.030]"
    assert difference.seen_from("a") is difference


def test_five_models_and_five_metrics_fit_120_columns_even_with_long_names() -> None:
    names = [f"a model with a rather long descriptive name, number {index}" for index in range(5)]
    table = text_table([row(name, 0.1 * index) for index, name in enumerate(names)])
    assert max(map(len, table.splitlines())) <= 120
    for word in names[4].split():
        assert word in table


def test_columns_are_aligned_and_n_is_stated() -> None:
    lines = text_table([row("sft", 0.25), row("a longer name", 0.5)]).splitlines()
    assert lines[0].startswith("model")
    assert lines[0].endswith("time")
    assert len(lines[1]) == len(lines[2]) == len(lines[3])
    assert "0.500* [0.480, 0.520]" in lines[3]
    assert "*" not in lines[2]
    assert any(line.startswith("n = 900 users") for line in lines)
    assert any("tokens" in line and "without training" in line for line in lines)


def test_differing_numbers_of_users_get_a_column() -> None:
    table = text_table([row("a", 0.2, n=900), row("b", 0.3, n=850)])
    assert table.splitlines()[0].split()[-3:] == ["n", "tokens", "time"]
    assert "n = 850 to 900 users" in table


def test_one_row_wins_nothing_and_a_missing_metric_is_a_dash() -> None:
    only = ComparisonRow("only", {"hr@1": interval(0.5), "auc": interval(math.nan)})
    table = text_table([only])
    assert "0.500*" not in table
    assert "nan" not in table
    assert "tokens" not in table
    assert best_names([only], "hr@1") == set()
    assert "–" in text_table([only, ComparisonRow("other", {"hr@1": interval(0.1)})])  # noqa: RUF001


def test_the_dtype_of_language_models_is_named() -> None:
    rows = [
        ComparisonRow("base", {}, dtype="bfloat16"),
        ComparisonRow("popularity", {}),
        ComparisonRow("old", {}, dtype="float32"),
    ]
    assert text_table(rows).splitlines()[-1] == "language models computed in bfloat16: base; in float32: old"
    assert "computed in" not in text_table(rows[1:2])


def test_an_empty_comparison_is_still_a_table() -> None:
    assert text_table([]).startswith("model")


def test_ties_are_all_marked() -> None:
    assert best_names([row("a", 0.3), row("b", 0.3), row("c", 0.1)], "hr@1") == {"a", "b"}


def test_a_claim_states_wins_losses_ties_and_what_was_not_measured() -> None:
    def pair(other: str, value: float) -> Difference:
        return Difference("dmpo", other, "hr@1", interval(value, 0.01))

    pairs = [pair("sft", 0.05), pair("base", 0.2), pair("sdpo", 0.003)]
    beaten, level, unmeasured = claim("dmpo", "hr@1", pairs, ["random"]).split("; ")
    assert beaten == "dmpo beats sft by 0.050 [0.040, 0.060] and base by 0.200 [0.190, 0.210] on hr@1"
    assert level == "there is no significant difference to sdpo (+0.003 [-0.007, +0.013])"
    assert "random" in unmeasured
    assert "not measured" in unmeasured
    assert "is not shown to beat any other model" in claim("dmpo", "hr@1", [pair("sdpo", 0.003)])
    assert "falls behind sft by 0.050 [0.040, 0.060]" in claim("dmpo", "hr@1", [pair("sft", -0.05)])


def test_numbers_are_rounded_for_reading() -> None:
    assert format_interval({"value": 0.41249, "low": 0.3906, "high": 0.43351, "n": 5}) == "0.412 [0.391, 0.434]"
    # A bound that is above 0 must not read as 0.
    near = {"value": 0.0061, "low": 0.0002, "high": 0.012, "n": 5}
    assert format_interval(near, signed=True) == "+0.0061 [+0.0002, +0.0120]"
    assert format_interval({"value": 0.5, "low": math.nan, "high": math.nan, "n": 1}) == "0.500"
    counts = [None, 0, 812, 999_600, 12_345, 7_890_000_000]
    assert [format_count(count) for count in counts] == ["–", "0", "812", "1.00 M", "12.3 k", "7.89 B"]  # noqa: RUF001
    spans = [None, 4.21, 59.96, 725, 3599.6, 11_220]
    written = ["–", "4.2 s", "1 m 00 s", "12 m 05 s", "1 h 00 m", "3 h 07 m"]  # noqa: RUF001
    assert [format_seconds(span) for span in spans] == written


def test_chance_is_that_of_a_random_order() -> None:
    assert chance_level("hr@1", 20) == pytest.approx(0.05)
    assert chance_level("hr@50", 20) == 1.0
    assert chance_level("ndcg@2", 4) == pytest.approx((1 + 1 / math.log2(3)) / 4)
    assert chance_level("mrr", 2) == pytest.approx(0.75)
    assert chance_level("auc", 20) == 0.5
    assert chance_level("valid_ratio", 20) is None


def test_rows_of_two_protocols_name_theirs_and_have_a_largest_value_each() -> None:
    rows = [replace(row(name, value), seen=seen) for name, value, seen in ROWS_OF_TWO]
    table = text_table(rows)
    assert best_names(rows, "hr@1") == {"a, kept", "b, removed"}
    header, _, *lines = table.splitlines()
    assert "seen items" in header
    assert [line.split("  ")[0] for line in lines[:4] if "kept  " in line or "removed  " in line] == [
        name for name, *_ in ROWS_OF_TWO
    ]
    assert "compare rows of one kind only" in table
    assert "seen items" not in text_table([row("a", 0.1), row("b", 0.2)])
    both_kept = text_table(rows[:2])
    assert "seen items kept" in both_kept
    assert "seen items" not in both_kept.splitlines()[0]


def test_findings_never_compare_two_protocols() -> None:
    rows = [replace(row(name, value), seen=seen) for name, value, seen in ROWS_OF_TWO]
    pair = Difference("b, removed", "a, removed", "hr@1", {"value": 0.1, "low": 0.05, "high": 0.15, "n": 900})
    kept, *_, removed, level = findings(rows, [pair])
    assert kept.startswith("Seen items kept: a, kept has the highest hr@1")
    assert "removed" not in kept
    assert removed.startswith("Seen items removed: b, removed beats a, removed by 0.100")
    assert level.startswith("Seen items removed: b, removed has the highest hr@1: 0.900")


def test_questions_are_counted_beside_users() -> None:
    repeated = ComparisonRow("a", {"hr@1": {**interval(0.5), "questions": 2100}})
    assert user_range([repeated]) == "n = 900 users, 2,100 questions"
    assert user_range([row("a", 0.5), row("b", 0.5, n=1000)]) == "n = 900 to 1,000 users"


ROWS_OF_TWO = [("a, kept", 0.3, "kept"), ("b, kept", 0.2, "kept"), ("a, removed", 0.8, "removed"), ("b, removed", 0.9, "removed")]


def test_published_rows_stand_below_and_are_named_as_such():
    own = ComparisonRow("ours", {"hr@10": {"value": 0.1, "low": 0.09, "high": 0.11, "n": 50}})
    published = [PublishedRow(name="theirs", source="a paper's table", metrics={"hr@10": 0.25, "mrr": 0.5})]
    text = text_table([own], published=published)
    lines = text.splitlines()
    assert lines[2].startswith("ours") and "0.100" in lines[2]
    assert lines[3].split() == ["theirs", "0.250"]  # no star: nothing was measured
    assert "published, not measured here: theirs (a paper's table)" in text
    assert "n = 50 users" in text


def test_parts_stand_in_a_table_of_their_own() -> None:
    parts = {"cold": {"ndcg@10": interval(0.125, n=40)}, "warm": {"ndcg@10": {**interval(0.625, n=700), "questions": 860}}}
    lines = text_table([replace(row("a", 0.5), parts=parts), row("b", 0.4)]).splitlines()
    (header,) = (number for number, line in enumerate(lines) if line.startswith("ndcg@10 of"))
    assert "all" in lines[header] and "cold (40)" in lines[header] and "warm (860)" in lines[header]
    assert "0.125 [0.105, 0.145]" in lines[header + 2] and "0.625 [0.605, 0.645]" in lines[header + 2]
    assert lines[header + 3].split()[-2:] == ["\N{EN DASH}", "\N{EN DASH}"]
    assert max(map(len, lines)) <= 120
    assert "cold" not in text_table([row("a", 0.5)])


def test_the_recall_of_two_stages_is_told() -> None:
    text = text_table([replace(row("a", 0.5), recall={"num": 40, **interval(0.62)}), row("b", 0.4)])
    assert "a 0.620 [0.600, 0.640] of 40" in text
    assert "recall" not in text_table([row("b", 0.4)])


def test_a_row_of_several_seeds_says_so() -> None:
    repeated = replace(row("a", 0.5), metrics={metric: {**interval(0.5), "repeats": 3} for metric in METRICS})
    table = text_table([repeated, row("b", 0.4)])
    header, _, *lines = table.splitlines()[:4]
    end = header.index("seeds") + len("seeds")
    assert [line[end - 5 : end].strip() for line in lines] == ["3", "1"]
    assert "over users, and over seeds where a row has several" in table
    assert "seeds" not in text_table([row("b", 0.4)])
