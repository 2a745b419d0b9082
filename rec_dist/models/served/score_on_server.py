"""Scores items with the model in this folder on a server of vLLM or SGLang, by the log-probs of the prompt's own tokens.

    vllm serve FOLDER --served-model-name model --enable-prefix-caching
    python score_on_server.py vllm http://localhost:8000 '{"history": ["Alien"], "candidates": ["Heat", "Aliens"]}'

    python -m sglang.launch_server --model-path FOLDER
    python score_on_server.py sglang http://localhost:30000 '{"history": ["Alien"], "candidates": ["Heat", "Aliens"]}'

Each candidate is one request of the same batch: prompt and title as token ids, of which the server keeps the shared beginning. The
score is the sum of the title's log-probs, as score.py computes it. A server's softmax includes the tokens of soft prompts
(suppress_tokens in generation_config.json), which lowers all scores a little. Needs score.py beside it, and Python alone.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from urllib.request import Request, urlopen

from score import Prompts  # type: ignore[import-not-found]  # the file beside this one in an exported folder

TIMEOUT_SECONDS = 600


def _post(url: str, body: dict[str, Any]) -> Any:
    request = Request(url, json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=TIMEOUT_SECONDS) as answer:
        return json.load(answer)


def on_vllm(url: str, sequences: list[list[int]]) -> list[list[float]]:
    """The log-probs of all tokens but the first of each sequence, from vLLM's completions with prompt_logprobs."""
    body = {"model": "model", "prompt": sequences, "max_tokens": 1, "temperature": 0.0, "prompt_logprobs": 1}
    choices = sorted(_post(f"{url}/v1/completions", body)["choices"], key=lambda choice: int(choice["index"]))
    return [
        [float(known[str(token)]["logprob"]) for token, known in zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)]
        for tokens, choice in zip(sequences, choices, strict=True)
    ]


def on_sglang(url: str, sequences: list[list[int]]) -> list[list[float]]:
    """The same from SGLang's native /generate with return_logprob; an entry is (log-prob, token, text)."""
    sampling = {"max_new_tokens": 1, "temperature": 0.0}
    body = {"input_ids": sequences, "sampling_params": sampling, "return_logprob": True, "logprob_start_len": 0}
    answers = _post(f"{url}/generate", body)
    return [[float(entry[0]) for entry in answer["meta_info"]["input_token_logprobs"][1:]] for answer in answers]


SERVERS = {"vllm": on_vllm, "sglang": on_sglang}


def score(server: str, url: str, prompts: Prompts, history: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """The score of each candidate, in nats. server: vllm or sglang."""
    prompt, completions = prompts.prompt(history, candidates), [prompts.completion(item) for item in candidates]
    logps = SERVERS[server](url.rstrip("/"), [prompt + completion for completion in completions])
    return [sum(values[-len(completion) :]) for values, completion in zip(logps, completions, strict=True)]


def main() -> None:
    """Prints the candidates with their scores as JSON, the best first."""
    server, url, asked = sys.argv[1], sys.argv[2], json.loads(sys.argv[3])
    prompts = Prompts(Path(__file__).resolve().parent)
    scores = score(server, url, prompts, asked["history"], asked["candidates"])
    ranked = sorted(zip(asked["candidates"], scores, strict=True), key=lambda pair: -pair[1])
    print(json.dumps([{"item": item, "score": value} for item, value in ranked], ensure_ascii=False))


if __name__ == "__main__":
    main()
