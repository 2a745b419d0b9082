"""README.md of an exported model: what it is, what it learnt from, what it scored, how to use it, and which licences to state."""

import json
from dataclasses import dataclass
from typing import Any

from rec_dist.report.numbers import format_interval

CARD_NAME = "README.md"
UNKNOWN = "unknown"  # the Hub's word for a licence that nobody has stated

_USE = """```python
from pathlib import Path
import sys

folder = Path("FOLDER")  # this one, for example of huggingface_hub.snapshot_download
sys.path.insert(0, str(folder))
from score import Prompts, load_model, score

model, prompts = load_model(folder), Prompts(folder)
titles = [item["title"] for item in prompts.items]
print(score(model, prompts, history=titles[:2], candidates=titles[2:STOP]))
```"""
_SERVERS = """## On a server

vLLM and SGLang score candidates by the log-probs of prompt tokens; `score_on_server.py` asks either. FOLDER is this folder:

```bash
vllm serve FOLDER --served-model-name model --enable-prefix-caching
python FOLDER/score_on_server.py vllm http://localhost:8000 '{"history": ["TITLE"], "candidates": ["TITLE", "TITLE"]}'
```

```bash
python -m sglang.launch_server --model-path FOLDER
python FOLDER/score_on_server.py sglang http://localhost:30000 '{"history": ["TITLE"], "candidates": ["TITLE", "TITLE"]}'
```

This client was tried against a stand-in that answers in the documented form, not against either server."""


@dataclass(frozen=True)
class CardFacts:
    """What the card says. Paths of this machine are not among it.

    base: the Hub id or the folder's name of the base model; on_hub: whether it is an id. weights: in words. data: facts by name.
    evaluation: the row of the run's evaluation, None without one. num_items: None on preference rows. num_listed: the candidates
    that a prompt lists, 0 for none. scores_text: as in Ranker.scores_text. license, data_license: as the user states them.
    """

    name: str
    method: str
    base: str
    on_hub: bool
    is_adapter: bool
    weights: str
    settings: dict[str, Any]
    data: dict[str, Any]
    evaluation: dict[str, Any] | None
    num_items: int | None
    num_listed: int
    scores_text: bool
    for_servers: bool
    license: str = UNKNOWN
    data_license: str = UNKNOWN


def card_of(facts: CardFacts) -> str:
    """The text of README.md, with the fields that the Hub reads in front."""
    parts = [
        _front(facts),
        f"# {facts.name}\n\nRanks items for users: {facts.weights}, trained by rec-dist with `{facts.method}` on `{facts.base}`.",
        "## Data\n\n" + _table(facts.data),
        "## Training\n\n" + _table(facts.settings),
        "## Evaluation\n\n" + _evaluation(facts.evaluation),
        "## Use\n\n" + _use(facts),
        *([_SERVERS] if facts.for_servers else []),
        "## Licences\n\n" + _licences(facts),
    ]
    return "\n\n".join(parts) + "\n"


def _front(facts: CardFacts) -> str:
    fields: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "license": facts.license,
        "tags": ["recommendation", "sequential-recommendation", "rec-dist"],
    }
    if facts.on_hub:
        fields["base_model"] = facts.base
    if facts.evaluation is not None:
        metrics = [{"type": name, "value": round(m["value"], 6)} for name, m in facts.evaluation["metrics"].items()]
        data = {"name": str(facts.data.get("source", UNKNOWN)), "type": "interactions"}
        result = {"task": {"type": "text-generation", "name": "ranking"}, "dataset": data, "metrics": metrics}
        fields["model-index"] = [{"name": facts.name, "results": [result]}]
    return "\n".join(["---", *(f"{key}: {json.dumps(value, ensure_ascii=False)}" for key, value in fields.items()), "---"])


def _table(values: dict[str, Any]) -> str:
    rows = [f"| {key} | {_cell(value)} |" for key, value in values.items()]
    return "\n".join(["| | |", "|---|---|", *rows])


def _cell(value: Any) -> str:
    """One cell of a Markdown table: text of others on one line, without what would end the cell."""
    text = value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
    return json.dumps(text, ensure_ascii=False)[1:-1].replace("|", "\\|").replace("<", "&lt;").replace('\\"', '"')


def _evaluation(row: dict[str, Any] | None) -> str:
    if row is None:
        return "This run was not evaluated."
    asked = f"the {row['split']} split" if "split" in row else f"the questions of {row.get('questions')}"
    known = {"all": "all items", "low_rated": "items that the user rated low"}
    among = known.get(str(row["num_candidates"]), f"{row['num_candidates']} candidates")
    lines = [f"| {name} | {format_interval(metric)} | {int(metric['n']):,} |" for name, metric in row["metrics"].items()]
    head = f"On {asked}, one target among {among}; 95 % bootstrap interval over users; computed in {row.get('dtype', 'float32')}."
    return "\n".join([head, "", "| metric | value | users |", "|---|---|---|", *lines])


def _use(facts: CardFacts) -> str:
    if facts.num_items is None:
        return (
            "The model continues a prompt of text with a completion; `completions.json` holds the tokens that end a completion."
        )
    example = _USE.replace("STOP", str(2 + (facts.num_listed or 3)))
    needs = "torch, transformers and peft" if facts.is_adapter else "torch and transformers"
    kept = f"`prompt.json` and `catalogue.jsonl` hold the prompt and the {facts.num_items:,} titles as token ids. Needs {needs}."
    if not facts.scores_text:
        return f"{kept} The metrics above rank by more than the log-probability of a title, which `score.py` gives.\n\n{example}"
    return f"A score is the log-probability of a title and its end after the prompt, in nats. {kept}\n\n{example}"


def _licences(facts: CardFacts) -> str:
    return _table(
        {
            "these weights": facts.license,
            "base model": f"that of {facts.base}; read its own card",
            "data, titles included": facts.data_license,
        }
    )
