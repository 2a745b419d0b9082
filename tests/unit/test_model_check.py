"""A model folder or adapter that cannot be used is one line and exit code 2 in every command, before a worker starts."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from rec_dist.errors import UserError
from rec_dist.models.shape import position_limit

Change = Callable[[Path], None]


def _edit_config(**changes: Any) -> Change:
    def edit(folder: Path) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps({**json.loads(path.read_text(encoding="utf-8")), **changes}), encoding="utf-8")

    return edit


def _more_tokens(folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(str(folder))
    tokenizer.add_tokens(["River"])
    tokenizer.save_pretrained(str(folder))


def _cut(folder: Path) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _pointer(folder: Path) -> None:
    text = "version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 123456\n"
    (folder / "model.safetensors").write_text(text, encoding="utf-8")


def _a_part_is_missing(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    places = {"model.norm.weight": "model-00001-of-00002.safetensors", "lm_head.weight": "model-00002-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": places}), encoding="utf-8")


def _a_weight_is_missing(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def _write(name: str, text: str) -> Change:
    return lambda folder: (folder / name).write_text(text, encoding="utf-8") and None


BROKEN: dict[str, tuple[Change, tuple[str, ...]]] = {
    "more tokens than rows": (_more_tokens, ("tokenizer makes token 320", "rows 0 to 319", "name a folder")),
    "quantised": (_edit_config(quantization_config={"quant_method": "gptq", "bits": 4}), ("quantised", "gptq", "unquantised")),
    "cut short": (_cut, ("model.safetensors cannot be read", "again")),
    "a pointer": (_pointer, ("git lfs pull",)),
    "a part is missing": (_a_part_is_missing, ("lacks model-00002-of-00002.safetensors", "again")),
    "a weight is missing": (_a_weight_is_missing, ("lack 1 weight", "model.layers.1.mlp.up_proj.weight", "again")),
    "another shape": (_edit_config(vocab_size=321), ("model.embed_tokens.weight", "(320, 32)", "(321, 32)", "same model")),
    "heads that do not divide": (_edit_config(num_attention_heads=5), ("model.path", "holds no model that loads", "heads")),
    "config.json is cut": (_write("config.json", '{"model_type": "lla'), ("model.path", "holds no model that loads")),
    "config.json is a list": (_write("config.json", "[1]"), ("model.path",)),
    "the tokenizer is cut": (_write("tokenizer.json", '{"version": "1.0", "tru'), ("no tokenizer that loads", "name a model")),
    "an encoder-decoder": (_edit_config(model_type="t5"), ("no usable causal language model", "t5", "choose a decoder")),
    "of an unknown kind": (_edit_config(model_type="nosuch"), ("nosuch",)),
}
COMMANDS = {
    "train": ["train", "{config}"],
    "profile": ["profile", "{config}"],
    "evaluate": ["evaluate", "{config}"],
    "rank": ["rank", "{config}", "--out", "{folder}/ranked.jsonl"],
    "embed": ["embed", "{config}", "{folder}/items"],
}


@pytest.fixture
def refused(
    tmp_path: Path, tiny_model_dir: Path, tiny_config: Callable[..., dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> Callable[..., None]:
    """refused(change, command, names, *overrides): the command, with a changed copy of the tiny model, is refused."""

    def run(change: Change | None, command: list[str], names: tuple[str, ...], *overrides: str) -> None:
        from rec_dist.cli import main

        model, config = tmp_path / "model", tmp_path / "config.yaml"
        shutil.copytree(tiny_model_dir, model)
        if change is not None:
            change(model)
        config.write_text(yaml.safe_dump(tiny_config(tmp_path / "run", f"model.path={model}", *overrides)), encoding="utf-8")
        before = sorted(tmp_path.rglob("*"))
        capsys.readouterr()
        code = main([word.format(config=config, folder=tmp_path) for word in command])
        lines = capsys.readouterr().err.splitlines()
        assert code == 2, lines
        assert [line.startswith("error: ") for line in lines].count(True) == 1 and lines[-1].startswith("error: ")
        assert not [name for name in names if name not in lines[-1]], lines[-1]
        assert sorted(tmp_path.rglob("*")) == before

    return run


@pytest.fixture(autouse=True)
def no_worker(monkeypatch: pytest.MonkeyPatch) -> None:
    def started(*_: Any, **__: Any) -> None:
        raise AssertionError("a worker was started")

    for name in ("train", "evaluate", "profile"):
        monkeypatch.setattr(f"rec_dist.commands.{name}.launch", started)


@pytest.mark.parametrize("name", sorted(BROKEN))
def test_a_model_that_cannot_train(refused: Callable[..., None], name: str) -> None:
    change, names = BROKEN[name]
    refused(change, COMMANDS["train"], names)


@pytest.mark.parametrize("name", ["more tokens than rows", "quantised", "a weight is missing"])
@pytest.mark.parametrize("command", sorted(COMMANDS.keys() - {"train"}))
def test_every_command_refuses_it(refused: Callable[..., None], command: str, name: str) -> None:
    change, names = BROKEN[name]
    refused(change, COMMANDS[command], names)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("modules", "names"),
    [
        ("[lm_head]", ("lm_head", "the model's head", "leave it out")),
        ("[q_proj,lm_head]", ("lm_head", "the model's head", "leave it out")),
        ("[embed_tokens]", ("model.embed_tokens", "input embedding", "leave it out")),
        (".*", ("adapter.target_modules (.*)",)),
        ("[nothing]", ("adapter.target_modules", "nothing", "all-linear")),
        ("[]", ("adapter.target_modules ([])", "all-linear")),
        ("(", ("adapter.target_modules (()", "all-linear")),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_an_adapter_that_could_not_be_evaluated(
    refused: Callable[..., None], tied: bool, modules: str, names: tuple[str, ...]
) -> None:
    def change(folder: Path) -> None:
        if not tied:
            _untie(folder)

    refused(change, COMMANDS["train"], names, f"adapter.target_modules={modules}")


def _untie(folder: Path) -> None:
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _edit_config(tie_word_embeddings=False)(folder)


def test_a_plan_refuses_the_same_adapter(refused: Callable[..., None]) -> None:
    command = ["plan", "{config}", "plan.cluster=local-cpu"]
    refused(None, command, ("lm_head", "the model's head"), "adapter.target_modules=[lm_head]")


@pytest.mark.parametrize("command", sorted([*COMMANDS, "plan"]))
def test_prompts_beyond_the_last_position(refused: Callable[..., None], command: str) -> None:
    words = COMMANDS.get(command, ["plan", "{config}", "plan.cluster=local-cpu"])
    refused(_edit_config(max_position_embeddings=12), words, ("positions", "the model has 12"))


def test_a_micro_batch_too_small_for_the_evaluation(refused: Callable[..., None]) -> None:
    """Training has shorter histories than the test split: these would be refused when the model is finished."""
    overrides = ("negatives.num=0", "prompt.max_history=20", "train.max_tokens_per_micro_batch=108", "train.max_steps=1")
    refused(None, COMMANDS["train"], ("train.max_tokens_per_micro_batch (108)", "evaluate.split=test", "raise it"), *overrides)


def test_candidates_that_an_evaluation_could_not_list(refused: Callable[..., None]) -> None:
    names = ("evaluate.num_candidates (10)", "prompt.num_candidates (20)", "must equal")
    refused(None, COMMANDS["train"], names, "prompt.candidates=listed")


@pytest.mark.parametrize(
    ("config", "limit"),
    [
        ({}, None),
        ({"max_position_embeddings": 2048}, 2048),
        ({"n_positions": 1024}, 1024),
        ({"max_position_embeddings": 131072, "rope_parameters": {"rope_type": "default"}}, 131072),
        (
            {
                "max_position_embeddings": 131072,
                "original_max_position_embeddings": 4096,
                "rope_scaling": {"type": "longrope", "short_factor": [1.0]},
            },
            4096,
        ),
        (
            {"max_position_embeddings": 64, "rope_parameters": {"rope_type": "longrope", "original_max_position_embeddings": 32}},
            32,
        ),
        ({"max_position_embeddings": 64, "rope_parameters": {"full_attention": {"rope_type": "default"}}}, 64),
    ],
)
def test_positions_of_a_config(config: dict[str, Any], limit: int | None) -> None:
    assert position_limit(config) == limit


def test_a_tokenizer_may_know_more_than_texts_use(tiny_tokenizer: Any) -> None:
    """Gemma 3's knows an image token that its language model has no row for."""
    from rec_dist.data.prompts.tokens import check_vocabulary

    check_vocabulary(tiny_tokenizer, [3, 200], 201)
    with pytest.raises(UserError, match="token 200"):
        check_vocabulary(tiny_tokenizer, [3, 200], 200)
