"""Prompts are assembled from pieces of tokens. They must read as the text that a person would have written."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from rec_dist.config.schema import PromptConfig
from rec_dist.data.prompts.builder import PROMPT_NAME, PromptBuilder, build_prompt_builder, check_saved
from rec_dist.data.prompts.tokens import begin_tokens, build_token_table, load_tokenizer, piece_tokens
from rec_dist.errors import UserError
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import pack_prompts

TITLES = ["Silent River", "Golden Garden", "Last Letter", "Émigré 七 (1999)", "Broken Mirror"]
SMOLLM = Path("~/.cache/rec-dist/models/smollm2-135m-instruct-b179c952").expanduser()


@pytest.fixture(params=["tiny", "smollm2"])
def tokenizer(request: pytest.FixtureRequest) -> Any:
    if request.param == "tiny":
        return request.getfixturevalue("tiny_tokenizer")
    if not (SMOLLM / "tokenizer.json").is_file():
        pytest.skip("the quickstart's model has not been fetched on this machine")
    return load_tokenizer(SMOLLM)


def items(*numbers: int) -> np.ndarray:
    return np.asarray(numbers, dtype=np.int32)


def build(tokenizer: Any, **changes: Any) -> PromptBuilder:
    return build_prompt_builder(PromptConfig(**{"instruction": "A user watched:", **changes}), tokenizer, TITLES)


def ids(tokenizer: Any, text: str) -> list[int]:
    return tokenizer(text, add_special_tokens=False).input_ids


def completions(grouped: GroupedPrompt) -> list[list[int]]:
    return [part.tolist() for part in np.split(grouped.targets, np.cumsum(grouped.lengths)[:-1])]


def test_pieces_are_the_tokens_of_the_whole_text(tokenizer: Any) -> None:
    """A prompt and its completion, read together, have exactly the tokens that the tokenizer makes of the whole text."""
    grouped = build(tokenizer).grouped_prompt(items(0, 3, 2), [items(1, 4)], [7])
    prompt = "A user watched:\n- Silent River\n- Émigré 七 (1999)\n- Last Letter\n-"
    for answer, title in zip(completions(grouped), ["Golden Garden", "Broken Mirror"], strict=True):
        assert grouped.tokens.tolist() + answer == begin_tokens(tokenizer) + ids(tokenizer, f"{prompt} {title}\n")


def test_completion_inputs_are_the_completions_without_their_last_token(tiny_tokenizer: Any) -> None:
    grouped = build(tiny_tokenizer).grouped_prompt(items(0), [items(1, 2), items(3)], [7, 8], branch_at=[0, 1])
    assert grouped.completion_inputs.tolist() == [token for answer in completions(grouped) for token in answer[:-1]]
    assert grouped.group_sizes.tolist() == [2, 1]
    assert grouped.keys.tolist() == [7, 8]


def test_a_chosen_item_that_the_history_goes_on_with_takes_no_rows(tokenizer: Any) -> None:
    """Its title stands on the prompt after its branch point. Negatives and the last target still need their own completions."""
    builder, history = build(tokenizer), items(0, 1, 2)
    grouped = builder.grouped_prompt(history, [items(1, 4), items(2, 3), items(4, 0)], range(3), branch_at=[1, 2, 3])
    sizes = [len(builder.titles[item]) for item in (4, 3, 4, 0)]
    assert grouped.input_lengths.tolist() == [0, sizes[0], 0, sizes[1], sizes[2], sizes[3]]
    assert grouped.lengths.tolist() == [len(builder.completion(item)) for item in (1, 4, 2, 3, 4, 0)]
    batch = pack_prompts([grouped])
    for place, (group, item) in enumerate([(0, 1), (1, 2)]):
        rows = batch.rows[batch.completion_offsets[2 * group] : batch.completion_offsets[2 * group + 1]]
        assert batch.input_ids[rows[1:]].tolist() == builder.titles[item].tolist()
        assert rows[0] == grouped.branch_points[place]


def test_every_branch_point_of_a_timeline_ends_the_prompt_of_its_own(tokenizer: Any) -> None:
    """Each target in a grouped prompt sees what its own prompt would hold: the items before it, and then the item prefix."""
    builder, history = build(tokenizer), items(0, 1, 2, 3)
    timeline = builder.grouped_prompt(history, [items(4)] * 5, range(5), branch_at=[0, 1, 2, 3, 4])
    for count, branch_point in enumerate(timeline.branch_points.tolist()):
        alone = builder.grouped_prompt(history[:count], [items(4)], [0])
        assert timeline.tokens[: branch_point + 1].tolist() == alone.tokens.tolist()
        assert alone.branch_points.tolist() == [len(alone.tokens) - 1]


def test_listed_candidates_stand_after_the_history_in_their_order(tokenizer: Any) -> None:
    builder = build(tokenizer, candidates="listed", candidates_header="\nAmong:", answer_header="\nNext:")
    grouped = builder.grouped_prompt(items(0), [items(4, 1)], [0], listed=items(1, 4))
    text = "A user watched:\n- Silent River\nAmong:\n- Golden Garden\n- Broken Mirror\nNext:\n-"
    assert tokenizer.decode(grouped.tokens.tolist()).removeprefix(tokenizer.bos_token or "") in (
        text,
        tokenizer.decode(ids(tokenizer, text)),
    )
    assert grouped.branch_points.tolist() == [len(grouped.tokens) - 1]


def test_chat_style_is_the_models_own_template(tokenizer: Any) -> None:
    builder = build(tokenizer, style="chat", question="Which next?", end="<eos>")
    grouped = builder.grouped_prompt(items(0, 1), [items(2)], [0])
    content = "A user watched:\n- Silent River\n- Golden Garden\nWhich next?"
    text = tokenizer.apply_chat_template([{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True)
    assert tokenizer.decode(grouped.tokens.tolist()) == tokenizer.decode(ids(tokenizer, text))
    assert completions(grouped)[0][-1] == tokenizer.eos_token_id


def test_no_title_is_a_prefix_of_another_completion(tokenizer: Any) -> None:
    """The end token is scored, so that "Heat" does not win whenever "Heat Wave" is likely."""
    builder = build_prompt_builder(PromptConfig(), tokenizer, ["Heat", "Heat Wave"])
    short, long = builder.completion(0).tolist(), builder.completion(1).tolist()
    assert long[: len(short)] != short
    assert short[: len(short) - 1] == long[: len(short) - 1]


def test_a_title_has_the_same_tokens_in_the_history_and_as_an_answer(tokenizer: Any) -> None:
    builder = build(tokenizer)
    title = builder.titles[3].tolist()
    grouped = builder.grouped_prompt(items(3), [items(3)], [0])
    begin = len(builder.pieces.begin) + len(builder.pieces.item_prefix)
    assert grouped.tokens[begin : begin + len(title)].tolist() == completions(grouped)[0][: len(title)] == title


def test_a_seam_that_a_token_spans_falls_back_to_the_piece_alone(tiny_tokenizer: Any) -> None:
    whole = ids(tiny_tokenizer, " River")
    assert len(whole) < len(ids(tiny_tokenizer, " Riv")) + len(ids(tiny_tokenizer, "er"))
    assert piece_tokens(tiny_tokenizer, "er", after=" Riv") == ids(tiny_tokenizer, "er")
    assert piece_tokens(tiny_tokenizer, "", after="a") == []


@pytest.mark.parametrize("title", ["", "  "])
def test_an_empty_title_is_named(tiny_tokenizer: Any, title: str) -> None:
    with pytest.raises(UserError, match="item 1 has a title"):
        build_token_table(tiny_tokenizer, ["Heat", title], after="\n-")


def test_pieces_that_cannot_work_are_the_users_mistake(tiny_tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"prompt\.item_prefix"):
        build(tiny_tokenizer, item_prefix="")
    with pytest.raises(UserError, match=r"prompt\.end"):
        build(tiny_tokenizer, end="")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", None)
    with pytest.raises(UserError, match="no chat template"):
        build(tiny_tokenizer, style="chat")
    monkeypatch.setattr(tiny_tokenizer, "chat_template", "{{ messages[0].content | upper }} {{ messages[0].content }}")
    with pytest.raises(UserError, match=r"prompt\.style.*exactly once.*prompt\.style=list"):
        build(tiny_tokenizer, style="chat")


def test_a_saved_prompt_refuses_a_changed_one_and_names_what_changed(tiny_tokenizer: Any, tmp_path: Path) -> None:
    build(tiny_tokenizer).save(tmp_path)
    check_saved(build(tiny_tokenizer), tmp_path)
    with pytest.raises(UserError, match=r"\(begin, max_history differ\)"):
        check_saved(build(tiny_tokenizer, instruction="They saw:", max_history=3), tmp_path)
    assert json.loads((tmp_path / PROMPT_NAME).read_text())["end"] == ids(tiny_tokenizer, "\n")


def test_the_fingerprint_changes_with_all_that_a_prompt_is_made_of(tiny_tokenizer: Any) -> None:
    variants = [{}, {"instruction": "x"}, {"item_prefix": "\n*"}, {"end": "<eos>"}, {"max_history": 3}, {"candidates": "listed"}]
    prints = [build(tiny_tokenizer, **changes).fingerprint for changes in variants]
    prints.append(build_prompt_builder(PromptConfig(instruction="A user watched:"), tiny_tokenizer, TITLES[::-1]).fingerprint)
    moved = ["Silent", "River Golden Garden", *TITLES[2:]]  # the same tokens overall, split into titles at another place
    prints.append(build_prompt_builder(PromptConfig(instruction="A user watched:"), tiny_tokenizer, moved).fingerprint)
    assert len(set(prints)) == len(prints)
    same = ["Silent River Golden", "Garden", *TITLES[2:]]
    assert build_prompt_builder(PromptConfig(instruction="A user watched:"), tiny_tokenizer, same).fingerprint not in prints


def test_a_folder_without_a_tokenizer_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no tokenizer that loads"):
        load_tokenizer(tmp_path)
