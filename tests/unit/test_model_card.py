"""The card of an exported model, where a run would take minutes: a prompt that lists its candidates, and text of others."""

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import yaml

from rec_dist.commands.card_facts import settings_of
from rec_dist.commands.model_card import CardFacts, card_of
from rec_dist.config.load import load_config

FACTS = CardFacts(
    name="ranker",
    method="delrec",
    base="me/base",
    on_hub=True,
    is_adapter=False,
    weights="one plain model",
    settings={"seed": 0},
    data={"source": "rows | <b>\n# heading"},
    evaluation=None,
    num_items=80,
    num_listed=0,
    scores_text=True,
    for_servers=False,
)


def test_the_example_gives_as_many_candidates_as_the_prompt_lists() -> None:
    """score.py refuses any other number."""
    assert "candidates=titles[2:5]" in card_of(FACTS)
    assert "candidates=titles[2:22]" in card_of(replace(FACTS, num_listed=20))


def test_text_of_others_ends_no_cell_and_no_field() -> None:
    card = card_of(replace(FACTS, license='a: "b"\n---', data_license="| <x>"))
    front = yaml.safe_load(card.split("---\n")[1])
    assert front["license"] == 'a: "b"\n---' and front["base_model"] == "me/base"
    assert "\n# heading" not in card and "<b>" not in card
    assert "| data, titles included | \\| &lt;x> |" in card


@pytest.mark.parametrize(
    ("kind", "draws", "stated"), [("sdpo", True, 3), ("sft", True, None), ("retrieval", True, None), ("sdpo", False, None)]
)
def test_negatives_are_stated_where_the_loss_has_drawn_some(
    tiny_config: Callable[..., dict[str, Any]], kind: str, draws: bool, stated: int | None
) -> None:
    """negatives.num is 3 throughout; SFT has none, and preference rows bring their own."""
    settings = settings_of(load_config(tiny_config("run", f"task.kind={kind}")), has_adapter=True, draws=draws)
    assert settings.get("negatives") == stated
