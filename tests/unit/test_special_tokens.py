"""Text of data is never control: whatever special token a title holds, its tokens are ordinary ones, for every kind of tokenizer."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rec_dist.config.schema import PromptConfig
from rec_dist.data.dataset.schema import PreferenceRow
from rec_dist.data.prompts.builder import build_prompt_builder
from rec_dist.data.prompts.plain_text import PlainText
from rec_dist.data.prompts.text_prompts import tokenize_rows
from rec_dist.data.prompts.tokens import build_token_table, load_tokenizer
from rec_dist.errors import UserError
from rec_dist.runtime.messages import messages_to

SPECIAL = ["<s>", "</s>", "<unk>", "<|im_start|>", "<|im_end|>"]
TITLES = ["Silent River", "Golden Garden", "Last Letter of the Empire"]
SMOLLM = Path("~/.cache/rec-dist/models/smollm2-135m-instruct-b179c952").expanduser()


def byte_bpe() -> Any:
    """As GPT-2, Llama 3, Qwen."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    return tokenizer, trainers.BpeTrainer(vocab_size=300, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False)


def sentencepiece_bpe() -> Any:
    """As Llama 2, Mistral, Gemma."""
    from tokenizers import Tokenizer, models, normalizers, trainers

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    return tokenizer, trainers.BpeTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)


def unigram() -> Any:
    """As T5, XLNet: its vocabulary holds the special tokens as pieces."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    return tokenizer, trainers.UnigramTrainer(vocab_size=90, special_tokens=SPECIAL, unk_token="<unk>", show_progress=False)


def wordpiece() -> Any:
    """As BERT."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    return tokenizer, trainers.WordPieceTrainer(vocab_size=150, special_tokens=SPECIAL, show_progress=False)


def whole_words() -> Any:
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.WordLevel(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer, trainers.WordLevelTrainer(special_tokens=SPECIAL, show_progress=False)


FAMILIES: list[Callable[[], Any]] = [byte_bpe, sentencepiece_bpe, unigram, wordpiece, whole_words]


@pytest.fixture(scope="module", params=[*FAMILIES, "smollm2"], ids=lambda family: getattr(family, "__name__", family))
def tokenizer(request: pytest.FixtureRequest) -> Any:
    from transformers import PreTrainedTokenizerFast

    if request.param == "smollm2":
        if not (SMOLLM / "tokenizer.json").is_file():
            pytest.skip("the quickstart's model has not been fetched on this machine")
        return load_tokenizer(SMOLLM)
    made, trainer = request.param()
    made.train_from_iterator([*TITLES, "A user watched: \n- ; the and of a an < > | / s"] * 4, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=made,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        extra_special_tokens=["<|im_start|>", "<|im_end|>"],
    )


def special(tokenizer: Any) -> dict[str, int]:
    return {token.content: number for number, token in tokenizer.added_tokens_decoder.items() if token.special}


def control(tokenizer: Any) -> set[int]:
    """The ids that no plain text may give. A tokenizer with an unknown token gives that for what it does not know."""
    known = set(special(tokenizer).values())
    return known - {tokenizer.unk_token_id} if tokenizer.unk_token == "<unk>" else known


def test_no_title_gives_a_special_token(tokenizer: Any) -> None:
    names = special(tokenizer)
    titles = [title for name in names for title in (name, f"Silent {name}", f"Silent{name}River", f"{name} {name}, {name}")]
    said: list[str] = []
    with messages_to(said.append):
        builder = build_prompt_builder(PromptConfig(end="<eos>", max_title_tokens=512), tokenizer, [*TITLES, *titles])
    assert control(tokenizer).isdisjoint(builder.titles.tokens.tolist())
    assert all(length > 0 for length in builder.titles.lengths)
    assert any("titles hold special tokens of the tokenizer" in line for line in said)
    assert len({tuple(builder.titles[item].tolist()) for item in range(4)}) == 4, "a title is still told from others"


def test_titles_without_one_have_the_tokens_that_they_had(tokenizer: Any) -> None:
    after = "\n-"
    head = tokenizer(after, add_special_tokens=False).input_ids
    table = build_token_table(tokenizer, [*TITLES, f"Silent {tokenizer.eos_token}"], after=after)
    for item, title in enumerate(TITLES):
        whole = tokenizer(f"{after} {title}", add_special_tokens=False).input_ids
        alone = tokenizer(f" {title}", add_special_tokens=False).input_ids
        assert table[item].tolist() == (whole[len(head) :] if whole[: len(head)] == head else alone)


def test_what_the_configuration_adds_is_control(tokenizer: Any) -> None:
    eos = tokenizer.eos_token
    builder = build_prompt_builder(PromptConfig(end="<eos>", item_prefix=f"\n{eos}"), tokenizer, TITLES)
    assert builder.pieces.end == (tokenizer.eos_token_id,)
    assert tokenizer.eos_token_id in builder.pieces.item_prefix


@pytest.mark.parametrize("mode", ["split", "parse"])
def test_preference_rows_take_special_tokens_as_text_or_as_tokens(tokenizer: Any, mode: str) -> None:
    eos = tokenizer.eos_token
    rows = [
        PreferenceRow(f"Silent {eos} River:", [f" Golden{eos}", " Last"]),
        PreferenceRow("Last <", [f"{eos[1:]} Golden", " River"]),
    ]
    said: list[str] = []
    with messages_to(said.append):
        found = tokenize_rows([rows], tokenizer, [7], rejected=True, special_tokens=mode)
    for row, bounds in enumerate((found.prompt_offsets, found.completion_offsets)):
        tokens = (found.prompts, found.completions)[row][: bounds[1]].tolist()
        assert (tokenizer.eos_token_id in tokens) == (mode == "parse")
    assert any("prompt.special_tokens=parse" in line for line in said) == (mode == "split")


def test_a_template_stays_around_a_text_that_is_split(tiny_tokenizer: Any) -> None:
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<eos> $A <eos>", special_tokens=[("<eos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    plain = PlainText(tokenizer)
    texts = ["Silent River", "Silent <eos> River"]
    one, two = plain.with_template(texts)
    assert one == tokenizer(texts[0]).input_ids
    assert two[0] == two[-1] == 0
    assert 0 not in two[1:-1]
    assert tokenizer.decode(two[1:-1]) == texts[1]
    assert (plain.num_texts, plain.found["<eos>"]) == (1, 1)


def test_a_key_without_effect_is_refused(tiny_tokenizer: Any) -> None:
    with pytest.raises(UserError, match=r"prompt.special_tokens=parse is for preference rows"):
        build_prompt_builder(PromptConfig(special_tokens="parse"), tiny_tokenizer, TITLES)


def test_long_titles_are_cut_on_a_word_and_stay_distinct(tokenizer: Any) -> None:
    words = "the Silent River of a Golden Garden and the Last Letter " * 40
    long = [f"{words} {end}" for end in ("A", "B", "C")]
    titles = ["Silent River", *long, long[0], "x" * 3000, "Golden Garden"]
    said: list[str] = []
    with messages_to(said.append):
        table = build_token_table(tokenizer, titles, after="\n-", max_tokens=16)
    tokens = [tuple(table[item].tolist()) for item in range(len(titles))]
    assert max(map(len, tokens)) <= 16
    assert tokens[0] == tuple(build_token_table(tokenizer, titles[:1], after="\n-")[0].tolist()), "a short title stays"
    assert tokens[1] == tokens[4], "equal titles stay equal"
    if tokenizer.unk_token != "<unk>":  # others write the numbers that tell them apart as unknown
        assert len(set(tokens[:4])) == 4
    assert any("titles have more than 16 tokens (prompt.max_title_tokens) and are cut" in line for line in said)
