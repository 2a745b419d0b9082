"""The prompts of an exported model's script are those of the builder, token for token, also where the prompt lists candidates."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec_dist.config.schema import PromptConfig
from rec_dist.data.prompts.builder import build_prompt_builder
from rec_dist.models.served.score import Prompts

TITLES = ("Silent River", "Golden Garden", "Last Letter", "Broken Empire", "Golden Garden")


@pytest.mark.parametrize("keys", [{}, {"candidates": "listed", "num_candidates": 3}, {"style": "chat", "max_history": 2}])
def test_prompts_are_those_of_the_builder(tiny_tokenizer: Any, tmp_path: Path, keys: dict[str, Any]) -> None:
    builder = build_prompt_builder(PromptConfig(**keys), tiny_tokenizer, TITLES)
    builder.save(tmp_path)
    ids = ["i0", "i1", "i2", "i3", "i4\u2028"]  # Unicode's line separator ends no line of JSON
    rows = [{"item_id": ids[n], "title": title, "tokens": builder.titles[n].tolist()} for n, title in enumerate(TITLES)]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "catalogue.jsonl").write_text(lines, encoding="utf-8")
    prompts = Prompts(tmp_path)
    history, candidates = np.asarray([3, 0, 2], dtype=np.int32), np.asarray([1, 4, 0], dtype=np.int32)
    listed = candidates if builder.listed else None
    wanted = builder.grouped_prompt(history[-builder.max_history :], [candidates], [0], listed=listed)
    names = ["i3", "Silent River", "i2"]  # ids and titles mean the same
    assert prompts.prompt(names, ["Golden Garden", ids[4], "i0"]) == wanted.tokens.tolist()
    assert [token for item in ("i1", ids[4], "i0") for token in prompts.completion(item)] == wanted.targets.tolist()
    with pytest.raises(KeyError):
        prompts.prompt(["Unknown Film"], ["i1", "i2", "i3"])
    if builder.listed:
        with pytest.raises(ValueError, match="lists 3 candidates, and 1"):
            prompts.prompt(names, ["i1"])
