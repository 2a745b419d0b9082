"""Scores items for a history with the model in this folder: log p(title, end | prompt), in nats; higher is better.

    python score.py '{"history": ["Alien"], "candidates": ["Heat", "Aliens"]}'

Items are ids of the source or titles, oldest first. Without candidates, all items are scored. Needs torch and transformers, and peft
if the folder holds an adapter. Prompts are made of the token ids in prompt.json and catalogue.jsonl, so no tokenizer is needed.
"""

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any


class Prompts:
    """The prompts of this model, as token ids. Raises KeyError for an item that is not in the catalogue."""

    def __init__(self, folder: Path) -> None:
        self._pieces: dict[str, Any] = json.loads((folder / "prompt.json").read_text(encoding="utf-8"))
        with (folder / "catalogue.jsonl").open(encoding="utf-8") as lines:
            self.items: list[dict[str, Any]] = [json.loads(line) for line in lines]
        self._tokens = {item["title"]: item["tokens"] for item in reversed(self.items)}  # of equal titles, the first item
        self._tokens |= {item["item_id"]: item["tokens"] for item in self.items}

    def prompt(self, history: Sequence[str], candidates: Sequence[str]) -> list[int]:
        """The prompt, which lists the candidates if this model was trained so, in the order in which they are given."""
        pieces, shown = self._pieces, history[-self._pieces["max_history"] :]
        tokens = [*pieces["begin"], *(token for item in shown for token in self._titled(item))]
        if pieces["listed"]:
            if len(candidates) != pieces["listed"]:
                raise ValueError(f"this model's prompt lists {pieces['listed']} candidates, and {len(candidates)} were given")
            listed = [token for item in candidates for token in self._titled(item)]
            tokens += [*pieces["candidates_header"], *listed, *pieces["answer_header"]]
        return tokens + list(pieces["tail"])

    def completion(self, item: str) -> list[int]:
        """The title and what ends it."""
        return [*self._tokens[item], *self._pieces["end"]]

    def _titled(self, item: str) -> list[int]:
        return [*self._pieces["item_prefix"], *self._tokens[item]]


def load_model(folder: Path) -> Any:
    """The model in float32 on the CPU; move it to a GPU, or load it in bfloat16, as you like."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(
        str(folder), dtype=torch.float32, trust_remote_code=False, use_safetensors=True
    ).eval()


def score(model: Any, prompts: Prompts, history: Sequence[str], candidates: Sequence[str]) -> list[float]:
    """The score of each candidate. Runs the model once for each; a server shares the prompt (score_on_server.py)."""
    import torch

    prompt, scores = prompts.prompt(history, candidates), []
    left_out = model.generation_config.suppress_tokens or []  # tokens of soft prompts, which are never an answer
    for item in candidates:
        completion = prompts.completion(item)
        ids = torch.tensor([prompt + completion], device=model.device)
        with torch.no_grad():
            logits = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
        logits[:, left_out] = -torch.inf
        scores.append(float(logits.log_softmax(-1).gather(1, ids[0, len(prompt) :, None]).sum()))
    return scores


def main() -> None:
    """Prints the candidates with their scores as JSON, the best first."""
    folder, asked = Path(__file__).resolve().parent, json.loads(sys.argv[1])
    prompts = Prompts(folder)
    candidates = asked.get("candidates") or [item["item_id"] for item in prompts.items]
    scores = score(load_model(folder), prompts, asked["history"], candidates)
    ranked = sorted(zip(candidates, scores, strict=True), key=lambda pair: -pair[1])
    print(json.dumps([{"item": item, "score": value} for item, value in ranked], ensure_ascii=False))


if __name__ == "__main__":
    main()
