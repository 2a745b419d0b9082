"""The targets of the GPU suite, as functions of its rows. Rows of a CPU are ignored: they only check the script."""

from collections.abc import Sequence
from typing import Any

from benchmarks.peer_targets import Verdict

Row = dict[str, Any]


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target beside its measurement; "not measured" if a row is missing or failed."""
    own = [row for row in rows if row["device"] == "cuda"]
    heads = [row for row in own if row["section"] == "head" and row.get("weight", "frozen") == "frozen" and row["M"] >= 4096]
    out = []
    for row in own:
        if row["section"] == "attention":
            out.append(Verdict("attention against the dense mask, log-probs apart", 0.01, row.get("logps apart"), at_least=False))
            out.append(Verdict("the same, gradients apart of their norm", 0.01, row.get("gradients apart"), at_least=False))
            late = row.get("compilations after the second micro-batch")
            out.append(Verdict("the same, compilations after the second micro-batch", 0, late, at_least=False))
    for vocab, scored in sorted({(row["V"], row["M"]) for row in heads}):
        here = {row["method"]: row for row in heads if (row["V"], row["M"]) == (vocab, scored)}
        ours, chunked = here.get("preference_head auto"), here.get("torch, chunked and recomputed")
        forward, bare = here.get("completion_logps auto, forward"), here.get("GEMM alone, forward")
        where = f"V={vocab:,} M={scored:,}"
        times, memory = _ratio(_time(ours), _time(chunked)), _ratio(_peak(ours), _peak(chunked))
        out.append(Verdict(f"preference_head / chunked torch, time, {where}", 1.0, times, at_least=False))
        out.append(Verdict(f"preference_head / chunked torch, peak memory, {where}", 0.1, memory, at_least=False))
        out.append(
            Verdict(f"completion_logps forward, of the speed of its GEMM, {where}", 0.8, _ratio(_time(bare), _time(forward)))
        )
    for row in own:
        if row["section"] == "peers" and row.get("model") == "8B LoRA" and row["method"] in ("d", "a, b, d"):
            out.append(Verdict(f"MFU of 8B LoRA, P={row['P']} K={row['K']}", 0.45, row.get("mfu")))
    return out


def _time(row: Row | None) -> float | None:
    return None if row is None else row.get("milliseconds", {}).get("median")


def _peak(row: Row | None) -> float | None:
    return None if row is None else row.get("peak_bytes")


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
