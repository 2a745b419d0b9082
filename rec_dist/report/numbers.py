"""How the numbers of a comparison are written, and what a random order would reach."""

import math
from collections.abc import Mapping

Interval = Mapping[str, float]

MISSING = "–"  # noqa: RUF001 - an en dash is how tables write "no value"


def format_interval(interval: Interval, *, signed: bool = False) -> str:
    """`0.412 [0.391, 0.433]`, or signed; a fourth digit where a bound would otherwise read as 0 without being 0."""
    value, low, high = (interval[key] for key in ("value", "low", "high"))
    if not math.isfinite(value):
        return MISSING
    hidden = any(0 < abs(bound) < 0.0005 for bound in (low, high))
    spec = f"{'+' if signed else ''}.{4 if hidden else 3}f"
    if not (math.isfinite(low) and math.isfinite(high)):
        return f"{value:{spec}}"
    return f"{value:{spec}} [{low:{spec}}, {high:{spec}}]"


def format_count(count: float | None) -> str:
    """Three significant digits: `812`, `12.3 k`, `4.56 M`, `7.89 B`."""
    if count is None or not math.isfinite(count):
        return MISSING
    for limit, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if count >= limit * 0.9995:  # 999,600 reads 1.00 M, not 1000 k
            scaled = count / limit
            decimals = 2 if scaled < 9.995 else 1 if scaled < 99.95 else 0
            return f"{scaled:.{decimals}f} {suffix}"
    return f"{count:.0f}"


def format_seconds(seconds: float | None) -> str:
    """`4.2 s`, `12 m 05 s`, `3 h 07 m`."""
    if seconds is None or not math.isfinite(seconds):
        return MISSING
    if seconds < 59.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 3600:
        return f"{whole // 60} m {whole % 60:02d} s"
    minutes = round(seconds / 60)
    return f"{minutes // 60} h {minutes % 60:02d} m"


def chance_level(metric: str, num_candidates: int) -> float | None:
    """The expected metric of a random order of C candidates with one relevant item; None for metrics not listed here.

    hr@K: K/C. ndcg@K: the sum of 1/log2(r + 1) over ranks r <= K, over C. mrr: that of 1/r over r <= C. auc: 1/2.
    """
    kind, _, cutoff = metric.partition("@")
    ranks = range(1, min(int(cutoff) if cutoff.isdigit() else num_candidates, num_candidates) + 1)
    gains = {"hr": lambda r: 1.0, "ndcg": lambda r: 1 / math.log2(r + 1), "mrr": lambda r: 1 / r}
    if kind == "auc":
        return 0.5
    return sum(map(gains[kind], ranks)) / num_candidates if kind in gains and num_candidates > 0 else None
