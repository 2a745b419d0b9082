"""The head on a GPU: ours against plain, chunked and compiled torch, forward and backward, and against the bare GEMMs.

M scored tokens (each in a row of its own), D width, V vocabulary, 8 tokens a completion, 16 completions a group.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from rec_dist_kernels import completion_logps, preference_head, preference_loss

WIDTH, CHUNK = 4096, 1024
Step = Callable[[], Any]


def cases(device: str) -> list[tuple[int, int, int, bool]]:
    """(V, M, D, whether the weight trains)."""
    if device == "cpu":
        return [(320, 128, 32, False), (320, 128, 32, True)]
    frozen = [(vocab, scored, WIDTH, False) for vocab in (128256, 152064, 32000) for scored in (4096, 16384)]
    return [*frozen, (128256, 4096, WIDTH, True)]


class HeadCase:
    """The inputs of one shape. Each method runs forward and backward on them."""

    def __init__(self, vocab: int, scored: int, width: int, trains: bool, device: str) -> None:
        generator = torch.Generator(device=device).manual_seed(0)
        dtype = torch.bfloat16 if device != "cpu" else torch.float32
        draw = lambda *size: torch.randn(*size, generator=generator, device=device, dtype=torch.float32)
        self.hidden = (draw(scored, width)).to(dtype).requires_grad_()
        self.weight = (draw(vocab, width) * width**-0.5).to(dtype).requires_grad_(trains)
        self.rows = torch.arange(scored, device=device)
        self.targets = torch.randint(0, vocab, (scored,), generator=generator, device=device)
        self.offsets = torch.arange(0, scored + 1, 8, device=device)
        self.groups = torch.arange(0, scored // 8 + 1, 16, device=device)
        self.reference = torch.full((scored // 8,), -80.0, device=device)

    def methods(self, *, compiled: bool) -> dict[str, Step]:
        """Maps each method's name to one step of it."""
        found: dict[str, Step] = {
            "GEMMs alone": self.gemms,
            "preference_head auto": lambda: self.joined("auto"),
            "preference_head triton": lambda: self.joined("triton"),
            "completion_logps auto": lambda: self.backward(self.ours("auto")),
            "completion_logps triton": lambda: self.backward(self.ours("triton")),
            "completion_logps reference": lambda: self.backward(self.ours("reference")),
            "torch": lambda: self.backward(self.plain(self.hidden, self.targets)),
            "torch, chunked and recomputed": lambda: self.backward(self.chunked()),
        }
        if compiled:
            step = torch.compile(self.plain, dynamic=False)
            found["torch.compile"] = lambda: self.backward(step(self.hidden, self.targets))
        # The bare product comes before the row that is compared with it.
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

    def joined(self, impl: Any) -> Tensor:
        inputs = (self.hidden, self.weight, self.rows, self.targets, self.offsets, self.reference, self.groups)
        loss, _ = preference_head(*inputs, kind="sdpo", beta=1.0, impl=impl)
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
