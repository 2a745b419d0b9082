"""The targets of the comparison with peers: the ideal ratio, and verdicts as functions of the measured rows.

P prompt tokens, C tokens of a completion, K negatives, N = K + 1 completions of a group.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 4200  # a micro-batch of a and b, unless one group is longer: about 9 GB of activations of the 135M shape


@dataclass(frozen=True)
class Point:
    """One setting. groups: how many groups a step trains, the same for every method."""

    prompt: int
    completion: int
    negatives: int
    groups: int

    @property
    def name(self) -> str:
        return f"P={self.prompt} K={self.negatives}"


def rho(prompt: int, completion: int, negatives: int) -> float:
    """Tokens with the prompt written out for each completion, over tokens with a shared prompt: N(P + C) / (P + N C).

    >>> round(rho(512, 10, 15), 1)
    12.4
    """
    size = negatives + 1
    return size * (prompt + completion) / (prompt + size * completion)


@dataclass(frozen=True)
class Verdict:
    """A target and its measurement. value is None if the rows that it needs were not measured."""

    claim: str
    limit: float
    value: float | None
    at_least: bool = True

    @property
    def verdict(self) -> str:
        if self.value is None:
            return "not measured"
        met = self.value >= self.limit if self.at_least else self.value <= self.limit
        return "met" if met else "not met"

    def row(self) -> dict[str, Any]:
        """The verdict as a row of a table."""
        sign = ">=" if self.at_least else "<="
        return {"target": self.claim, "limit": f"{sign} {self.limit:g}", "measured": self.value, "verdict": self.verdict}


Measured = dict[tuple[int, int, str], dict[str, Any]]  # (P, K, method) -> a row with groups_per_second and peak_bytes


def by_point(rows: Sequence[dict[str, Any]]) -> Measured:
    """The measured rows by (P, K, method)."""
    return {(row["prompt"], row["negatives"], row["method"]): row for row in rows if row.get("groups_per_second")}


def ratio(
    found: Measured, above: tuple[int, int, str], below: tuple[int, int, str], key: str = "groups_per_second"
) -> float | None:
    """found[above][key] / found[below][key]; None if one is missing."""
    if above not in found or below not in found or not found[below][key]:
        return None
    return float(found[above][key] / found[below][key])


def verdicts(rows: Sequence[dict[str, Any]]) -> list[Verdict]:
    """Every target beside its measurement."""
    found = by_point(rows)
    prompts = sorted({row["prompt"] for row in rows})
    completion = rows[0]["completion"] if rows else 8
    out = []
    for prompt in prompts:
        share = 0.95 if prompt >= 512 else 0.85
        for negatives in sorted({row["negatives"] for row in rows if row["prompt"] == prompt}):
            gain = ratio(found, (prompt, negatives, "d"), (prompt, negatives, "b"))
            value = None if gain is None else gain / rho(prompt, completion, negatives)
            out.append(Verdict(f"d/b over rho, P={prompt} K={negatives}", share, value))
    for prompt in prompts:
        for variant in ("c-default", "c-best"):
            value = ratio(found, (prompt, 1, "d"), (prompt, 1, variant))
            out.append(Verdict(f"d / {variant}, P={prompt} K=1", 2.2, value))
    for prompt in prompts:
        gain = ratio(found, (prompt, 3, "e"), (prompt, 3, "d"))
        out.append(Verdict(f"e / d, 10 targets a prompt, P={prompt} K=3", 2.5, gain))
    for prompt in (prompt for prompt in prompts if prompt >= 512):  # with a shorter prompt, completions are the larger part
        slower = ratio(found, (prompt, 3, "d"), (prompt, 15, "d"))
        out.append(Verdict(f"d: seconds a group, K=15 over K=3, P={prompt}", 1.25, slower, at_least=False))
        memory = ratio(found, (prompt, 15, "d"), (prompt, 1, "d"), "peak_bytes")
        out.append(Verdict(f"d: peak memory, K=15 over K=1, P={prompt}", 1.3, memory, at_least=False))
    return out
