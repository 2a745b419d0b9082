"""The sentences that a comparison allows: the claim first, then its evidence. "Beats" needs an interval that excludes 0."""

import math
from collections.abc import Mapping, Sequence

from rec_dist.report.numbers import Interval, chance_level, format_interval
from rec_dist.report.table import ABOVE, BELOW, LEVEL, ComparisonRow, Difference, headline_of, metric_names, protocols


def findings(rows: Sequence[ComparisonRow], differences: Sequence[Difference], num_candidates: int | None = None) -> list[str]:
    """One sentence a line. num_candidates: how many items each user's one relevant item was ranked among, None if that varies.

    Rows with seen items kept and rows with them removed are different questions, so each kind has its own sentences.
    """
    kinds = protocols(rows)
    if len(kinds) < 2:
        return _findings(rows, differences, num_candidates)
    lines: list[str] = []
    for seen in kinds:
        part = [row for row in rows if row.seen == seen]
        names = {row.name for row in part}
        own = [d for d in differences if d.better in names]  # a difference is between rows of one kind
        lines += [f"Seen items {seen}: {line}" for line in _findings(part, own, num_candidates)]
    return lines


def _findings(rows: Sequence[ComparisonRow], differences: Sequence[Difference], num_candidates: int | None) -> list[str]:
    metrics = [metric for metric in metric_names(rows) if _scored(rows, metric)]
    if not metrics:
        return ["No model was evaluated."]
    metric = headline_of(metrics)[0]  # differences are measured in it
    scored = _scored(rows, metric)
    leader = max(scored, key=lambda name: scored[name]["value"])
    level = f"{format_interval(scored[leader])} over {int(scored[leader]['n']):,} users"
    against_chance = _against_chance(num_candidates, scored, metric)
    if len(scored) == 1:
        return [f"{leader} reaches {metric} {level}; it was compared with no other model.", *against_chance]
    pairs = [d for d in differences if d.metric == metric]
    of_leader = [d.seen_from(leader) for d in pairs if leader in (d.better, d.worse)]
    measured = {leader, *(d.worse for d in of_leader)}
    lines = [claim(leader, metric, of_leader, [name for name in scored if name not in measured])]
    lines += [f"{leader} has the highest {metric}: {level}.", *against_chance]
    for verdict in (ABOVE, BELOW, LEVEL):
        rest = [d for d in pairs if d.verdict == verdict and leader not in (d.better, d.worse)]
        if rest:
            others = enumerate_names([f"{d.better} minus {d.worse} ({d.amount})" for d in rest])
            lines.append(f"Among the others, {verdict}: {others}.")
    known = {(d.better, d.worse): d.verdict for d in pairs}
    for d in differences:  # so that nobody picks the one metric out of several that agrees
        if known.get((d.better, d.worse), d.verdict) != d.verdict:
            lines.append(f"{d.metric} gives another verdict for {d.better} minus {d.worse}: {d.verdict}, {d.amount}.")
    return lines


def claim(leader: str, metric: str, pairs: Sequence[Difference], unmeasured: Sequence[str] = ()) -> str:
    """One sentence on the model with the largest value: which models it beats, with intervals, and which it does not.

    pairs: differences with `leader` as the minuend. unmeasured: the models without one.
    """
    beaten, level, lost = ([d for d in pairs if d.verdict == verdict] for verdict in (ABOVE, LEVEL, BELOW))
    parts = [f"{leader} has the highest {metric}, but is not shown to beat any other model"]
    if beaten:
        parts = [f"{leader} beats {enumerate_names([f'{d.worse} by {d.size}' for d in beaten])} on {metric}"]
    if level:
        parts.append(f"there is no significant difference to {enumerate_names([f'{d.worse} ({d.amount})' for d in level])}")
    if lost:
        parts.append(f"it falls behind {enumerate_names([f'{d.worse} by {d.seen_from(d.worse).size}' for d in lost])}")
    if unmeasured:
        parts.append(f"its difference to {enumerate_names(unmeasured)} was not measured")
    return "; ".join(parts) + "."


def enumerate_names(names: Sequence[str]) -> str:
    """`a`, `a and b`, `a, b and c`."""
    return " and ".join([", ".join(names[:-1]), names[-1]] if len(names) > 1 else names)


def _scored(rows: Sequence[ComparisonRow], metric: str) -> dict[str, Interval]:
    found = {row.name: row.metrics[metric] for row in rows if metric in row.metrics}
    return {name: interval for name, interval in found.items() if math.isfinite(interval["value"])}


def _against_chance(num_candidates: int | None, scored: Mapping[str, Interval], metric: str) -> list[str]:
    chance = chance_level(metric, num_candidates) if num_candidates else None
    if chance is None:
        return []
    weak = [name for name, interval in scored.items() if not interval["low"] > chance]
    verdict = f"; not shown to be better: {enumerate_names(weak)}" if weak else ""
    return [f"A random order of {num_candidates} candidates has an expected {metric} of {chance:.3f}{verdict}."]
