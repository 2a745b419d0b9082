"""The targets of the GPU suite, as functions of its rows. Rows of a CPU or of tiny shapes are ignored: they only check the script.

Each target stands with its reason; a target whose rows are missing or failed is "not measured".
"""

from collections.abc import Callable, Sequence
from typing import Any

from benchmarks import gpu_heads, gpu_peers
from benchmarks.peer_targets import Verdict

Row = dict[str, Any]

# preference_head's peak over that of full torch, by M, at V >= 128,256. torch holds three float32 copies of the logits at once, 12
# bytes each of M * V; ours 2 bytes for each logit of a chunk of at most 4,096 rows, and two gradients of the hidden rows.
_PEAKS = {4096: 0.2, 16384: 0.06}
# The glue between matrix products (norms, SwiGLU, RoPE, sums of gradients) takes about a quarter of an 8B step with 8,192 tokens by
# a count of bytes and FLOP; fused layers save about a sixth of the step.
_MFU_PLAIN, _MFU_FUSED = 0.40, 0.45


def verdicts(rows: Sequence[Row]) -> list[Verdict]:
    """Every target beside its measurement."""
    own = [row for row in rows if row["device"].startswith("cuda") and not row.get("tiny")]
    parts = (_attention, _kernels, _heads, _speed, _fused, _memory, _compilations, _waits, _loader)
    return [verdict for part in parts for verdict in part(own)]


def _at_most(claim: str, limit: float, value: float | None) -> Verdict:
    return Verdict(claim, limit, value, at_least=False)


def _attention(rows: Sequence[Row]) -> list[Verdict]:
    row = _find(rows, section="attention")
    late = "compilations after the second micro-batch"
    return [
        _at_most("attention against the dense mask, log-probs apart", 0.01, row.get("logps apart")),
        _at_most("the same, gradients apart of their norm", 0.01, row.get("gradients apart")),
        _at_most(f"the same, {late}", 0, row.get(late)),
    ]


def _loader(rows: Sequence[Row]) -> list[Verdict]:
    measured = [row for row in rows if row["section"] == "loader" and "equal" in row]
    wrong = sum(not (row["equal"] and row["pinned"] and row["sent"]) for row in measured)
    return [
        _at_most(
            "loader, ways whose batches differ from the thread's, are not pinned, or do not arrive",
            0,
            wrong if measured else None,
        )
    ]


def _kernels(rows: Sequence[Row]) -> list[Verdict]:
    measured = [row["rejected"] for row in rows if row["section"] == "kernels" and "rejected" in row]
    return [_at_most("kernels, results that the rule of acceptance rejects", 0, sum(measured) if measured else None)]


def _heads(rows: Sequence[Row]) -> list[Verdict]:
    out = []
    for case in gpu_heads.cases(tiny=False):
        if case.trains:
            continue
        here = {"section": "head", "V": case.vocab, "M": case.scored, "weight": "frozen"}
        row = lambda method, here=here: _find(rows, **here, method=method)
        ours, forward = row("preference_head auto"), row("completion_logps auto, forward")
        where = f"V={case.vocab:,} M={case.scored:,}"
        times = _ratio(_time(ours), _time(row("torch, chunked and recomputed")))
        out.append(_at_most(f"preference_head / chunked torch, time, {where}", 1.0, times))
        if case.vocab >= 128256:
            peaks = _ratio(ours.get("peak_bytes"), row("torch").get("peak_bytes"))
            out.append(_at_most(f"preference_head / full torch, peak memory, {where}", _PEAKS[case.scored], peaks))
        speed = _ratio(_time(row("GEMM alone, forward")), _time(forward))
        out.append(Verdict(f"completion_logps forward, of the speed of its GEMM, {where}", 0.8, speed))
    return out


def _speed(rows: Sequence[Row]) -> list[Verdict]:
    out = []
    for point in gpu_peers.points(tiny=False):
        row = _find(rows, section="peers", model="8B LoRA", method="d", P=point.prompt, K=point.negatives)
        out.append(Verdict(f"MFU of 8B LoRA, P={point.prompt} K={point.negatives}", _MFU_PLAIN, row.get("mfu")))
    engine = {"section": "engine", "model": "8B LoRA", "engine": "DeepSpeed", "ZeRO": 0}
    for layers, limit in (("plain", _MFU_PLAIN), ("fused", _MFU_FUSED)):
        row = _find(rows, **engine, layers=layers)
        out.append(Verdict(f"MFU of 8B LoRA through DeepSpeed, {layers} layers", limit, row.get("mfu")))
    ours, bare = _find(rows, **engine, layers="plain"), _find(rows, **{**engine, "engine": "plain torch", "ZeRO": ""})
    out.append(_at_most("8B LoRA, a step through DeepSpeed / through plain torch", 1.05, _ratio(_time(ours), _time(bare))))
    return out


def _fused(rows: Sequence[Row]) -> list[Verdict]:
    found = [row["excess in tolerances"] for row in rows if row["section"] == "fused" and "excess in tolerances" in row]
    return [_at_most("fused layers, errors beyond those of plain layers, in tolerances", 1, max(found, default=None))]


def _memory(rows: Sequence[Row]) -> list[Verdict]:
    """A plan that promises too little ends in a crash; one that promises a third too much wastes a GPU."""
    found = [row["planned / measured"] for row in rows if row["section"] == "memory" and row.get("planned / measured")]
    return [
        Verdict("planned / measured memory, smallest", 0.97, min(found, default=None)),
        _at_most("planned / measured memory, largest", 1.3, max(found, default=None)),
    ]


def _compilations(rows: Sequence[Row]) -> list[Verdict]:
    row = _find(rows, section="compilations")
    names = ("training, after the second", "scoring, after the second")
    return [_at_most(f"compilations in {name} length", 0, row.get(name)) for name in names]


def _waits(rows: Sequence[Row]) -> list[Verdict]:
    row = _find(rows, section="waits", engine="DeepSpeed")
    return [_at_most("waits for the GPU that a further micro-batch adds", 0, row.get("a micro-batch"))]


def _find(rows: Sequence[Row], **wanted: Any) -> Row:
    """The first row with these values, or an empty one."""
    matches: Callable[[Row], bool] = lambda row: all(row.get(key) == value for key, value in wanted.items())
    return next(filter(matches, rows), {})


def _time(row: Row) -> float | None:
    median: float | None = row.get("milliseconds", {}).get("median")
    return median


def _ratio(above: float | None, below: float | None) -> float | None:
    return above / below if above and below else None
