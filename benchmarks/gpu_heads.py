"""The head on a GPU: ours against plain, chunked and compiled torch, forward and backward, and against the bare GEMMs.

M scored tokens (each in a row of its own), D width, V vocabulary, 8 tokens a completion, 16 completions a group.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from benchmarks.gpu_rows import Place, Row, Suite
from rec_dist_kernels import completion_logps, preference_head, preference_loss

WIDTH, CHUNK = 4096, 1024
Step = Callable[[], Any]


class Case(NamedTuple):
    """V, M, D, whether the weight trains, and whether torch.compile is measured too, which takes about 20 s."""

    vocab: int
    scored: int
    width: int
    trains: bool
    compiled: bool = False


def cases(*, tiny: bool) -> list[Case]:
    """The shapes, most important first, since time may run out."""
    if tiny:
        return [Case(320, 128, 32, False), Case(320, 128, 32, True)]
    return [
        Case(128256, 4096, WIDTH, False, compiled=True),
        Case(128256, 16384, WIDTH, False),
        Case(128256, 4096, WIDTH, True, compiled=True),
        *(Case(vocab, scored, WIDTH, False) for vocab in (152064, 32000) for scored in (4096, 16384)),
    ]


class HeadCase:
    """The inputs of one shape. Each method runs forward and backward on them."""

    def __init__(self, case: Case, place: Place) -> None:
        vocab, scored, width, trains, self._compiled = case
        device = place.device
        torch.manual_seed(0)
        draw = lambda *size: torch.randn(*size, device=device, dtype=torch.float32)
        self.hidden = draw(scored, width).to(place.dtype).requires_grad_()
        self.weight = (draw(vocab, width) * width**-0.5).to(place.dtype).requires_grad_(trains)
        self.rows = torch.arange(scored, device=device)
        self.targets = torch.randint(0, vocab, (scored,), device=device)
        self.offsets = torch.arange(0, scored + 1, 8, device=device)
        self.groups = torch.arange(0, scored // 8 + 1, 16, device=device)
        self.reference = torch.full((scored // 8,), -80.0, device=device)

    def methods(self) -> dict[str, Step]:
        """Maps each method's name to one step of it. A bare product comes before the rows that are compared with it."""
        found: dict[str, Step] = {
            "GEMMs alone": self.gemms,
            "preference_head auto": self.joined,
            "completion_logps auto": lambda: self.backward(self.ours("auto")),
            "completion_logps reference": lambda: self.backward(self.ours("reference")),
            "torch": lambda: self.backward(self.plain(self.hidden, self.targets)),
            "torch, chunked and recomputed": lambda: self.backward(self.chunked()),
        }
        if self._compiled:
            step = torch.compile(self.plain, dynamic=False)
            found["torch.compile"] = lambda: self.backward(step(self.hidden, self.targets))
        return {**found, "GEMM alone, forward": self.gemm, "completion_logps auto, forward": self.forward}

    def gemms(self) -> None:
        """The products that any head needs: logits, the gradient of the hidden rows, and the weight's gradient if it trains."""
        with torch.no_grad():
            logits = self.hidden @ self.weight.T
            _ = logits @ self.weight
            if self.weight.requires_grad:
                _ = logits.T @ self.hidden

    def gemm(self) -> None:
        """The product for the logits alone."""
        with torch.no_grad():
            _ = self.hidden @ self.weight.T

    def forward(self) -> None:
        """Log-probs without a backward pass, as the reference pass and evaluation use them."""
        with torch.no_grad():
            self.ours("auto")

    def ours(self, impl: Any) -> Tensor:
        return completion_logps(self.hidden, self.weight, self.rows, self.targets, self.offsets, impl=impl)

    def joined(self) -> Tensor:
        inputs = (self.hidden, self.weight, self.rows, self.targets, self.offsets, self.reference, self.groups)
        loss, _ = preference_head(*inputs, kind="sdpo", beta=1.0)
        loss.backward()
        return loss.detach()

    def plain(self, hidden: Tensor, targets: Tensor) -> Tensor:
        logps = F.log_softmax(F.linear(hidden, self.weight).float(), dim=-1)
        return logps.gather(1, targets[:, None])[:, 0].view(-1, 8).sum(1)

    def chunked(self) -> Tensor:
        parts = zip(self.hidden.split(CHUNK), self.targets.split(CHUNK), strict=True)
        return torch.cat([checkpoint(self.plain, hidden, targets, use_reentrant=False) for hidden, targets in parts])

    def backward(self, logps: Tensor) -> Tensor:
        loss, _ = preference_loss(logps, self.reference, self.groups, kind="sdpo", beta=1.0)
        loss.sum().backward()
        return loss.sum().detach()

    def clear(self) -> None:
        """Clears gradients between steps, so that none accumulate."""
        self.hidden.grad = self.weight.grad = None


def run(suite: Suite) -> None:
    """A row for each method at each shape."""
    for case in cases(tiny=suite.place.tiny):
        suite.fresh()
        weight = "trains" if case.trains else "frozen"
        about = {"V": case.vocab, "M": case.scored, "D": case.width, "weight": weight}
        built = suite.build({**about, "method": "all"}, 2.0, lambda case=case: HeadCase(case, suite.place))  # type: ignore[misc]
        if built is not None:
            _run_case(suite, built, about)
        del built


def _run_case(suite: Suite, case: HeadCase, about: Row) -> None:
    bare: float | None = None
    for name, step in case.methods().items():

        def measure(name: str = name, step: Step = step) -> Row:
            nonlocal bare
            row = suite.time(step, clear=case.clear)
            milliseconds = row["milliseconds"]["median"]
            bare = milliseconds if name.startswith("GEMM") else bare
            return {**row, "x GEMMs": milliseconds / bare if bare else None}

        suite.row({**about, "method": name}, 25.0 if name == "torch.compile" else 3.0, measure)
