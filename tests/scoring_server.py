"""A stand-in for vLLM and SGLang on loopback: it answers in their documented forms, with the log-probs of plain transformers."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import torch
from loopback import loopback


@contextmanager
def serving_model(folder: Path) -> Iterator[str]:
    """Serves the model in `folder`; gives the address."""
    from transformers import AutoModelForCausalLM

    model: Any = AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()

    class Handler(_Handler):
        served = model

    with loopback(Handler) as address:
        yield address


class _Handler(BaseHTTPRequestHandler):
    served: Any

    def log_message(self, format: str, *args: object) -> None:
        """Prints nothing."""

    def do_POST(self) -> None:
        asked = json.loads(self.rfile.read(int(self.headers["content-length"])))
        if self.path == "/v1/completions":
            assert asked["prompt_logprobs"] == 1 and asked["model"] == "model"
            choices = [{"index": n, "prompt_logprobs": self._vllm(tokens)} for n, tokens in enumerate(asked["prompt"])]
            value: Any = {"choices": choices[::-1]}
        else:
            assert self.path == "/generate" and asked["return_logprob"] and asked["logprob_start_len"] == 0
            value = [{"meta_info": {"input_token_logprobs": self._sglang(tokens)}} for tokens in asked["input_ids"]]
        content = json.dumps(value).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def _logps(self, tokens: list[int]) -> torch.Tensor:
        with torch.no_grad():
            return self.served(input_ids=torch.tensor([tokens])).logits[0].float().log_softmax(-1)  # type: ignore[no-any-return]

    def _vllm(self, tokens: list[int]) -> list[Any]:
        """For each token but the first the likeliest token and the token itself."""
        found: list[Any] = [None]
        for row, token in zip(self._logps(tokens)[:-1], tokens[1:], strict=True):
            ids = {int(row.argmax()), token}
            found.append({str(one): {"logprob": float(row[one]), "rank": 1, "decoded_token": ""} for one in ids})
        return found

    def _sglang(self, tokens: list[int]) -> list[Any]:
        rows = zip(self._logps(tokens)[:-1], tokens[1:], strict=True)
        return [[None, tokens[0], None], *([float(row[token]), token, None] for row, token in rows)]
