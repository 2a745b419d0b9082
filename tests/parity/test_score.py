"""rec_dist.score equals plain transformers, one sequence at a time, and leaves the model as it was."""

import random
from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor, nn

from rec_dist.errors import UserError
from rec_dist.scoring import score

VOCAB = 320  # as of conftest's tokenizer
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,  # large, so that a row that sees one token too many is far off
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": 5, "layer_types": MIXED}
GPT2 = {"vocab_size": VOCAB, "n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
GPT2 |= {"attn_pdrop": 0.3, "resid_pdrop": 0.3, "embd_pdrop": 0.3, "bos_token_id": 0, "eos_token_id": 0}
FAMILIES = {
    "llama": lambda: transformers.LlamaConfig(**COMMON, tie_word_embeddings=True, attention_dropout=0.3),
    "qwen2": lambda: transformers.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=5, max_window_layers=1),
    "gemma2": lambda: transformers.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
    "gpt2": lambda: transformers.GPT2Config(**GPT2),
    "phi": lambda: transformers.PhiConfig(**COMMON, tie_word_embeddings=False),  # its head has a bias
}


def build(name: str, *, attention: str | None = None, dtype: torch.dtype = torch.float32) -> Any:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        options = {} if attention is None else {"attn_implementation": attention}
        return transformers.AutoModelForCausalLM.from_config(FAMILIES[name](), **options).to(dtype)


def with_lora(model: Any, targets: str | list[str]) -> Any:
    from peft import LoraConfig, get_peft_model

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(4)
        config = LoraConfig(
            r=4,
            lora_dropout=0.4,
            target_modules=targets,
            task_type="CAUSAL_LM",
            init_lora_weights=False,
            fan_in_fan_out=model.config.model_type == "gpt2",
        )
        return get_peft_model(model, config)


def make_inputs(seed: int = 0) -> tuple[list[list[int]], list[list[list[int]]]]:
    """Eleven prompts of 1 to 30 tokens, with 0 to 6 completions of 1 to 7 tokens."""
    rng = random.Random(seed)
    prompts = [[rng.randrange(VOCAB) for _ in range(length)] for length in (1, 30, 12, 9, 17, 4, 25, 2, 8, 13, 21)]
    sizes = (3, 6, 0, 1, 4, 2, 5, 1, 0, 2, 3)
    return prompts, [[[rng.randrange(VOCAB) for _ in range(rng.randint(1, 7))] for _ in range(size)] for size in sizes]


@torch.no_grad()
def one_by_one(model: Any, prompts: list[list[int]], completions: list[list[list[int]]]) -> list[Tensor]:
    """The same without any of our code."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    results = []
    for prompt, answers in zip(prompts, completions, strict=True):
        sums = torch.zeros(len(answers))
        for place, answer in enumerate(answers):
            logps = torch.log_softmax(model(input_ids=torch.tensor([prompt + answer])).logits[0].float(), -1)
            sums[place] = sum(logps[len(prompt) - 1 + step, token] for step, token in enumerate(answer))
        results.append(sums)
    for module, mode in modes:
        module.training = mode
    return results


def assert_same(found: list[Tensor], expected: list[Tensor], tolerance: float = 1e-4) -> None:
    assert [one.shape for one in found] == [one.shape for one in expected]
    assert all(one.dtype == torch.float32 and one.dim() == 1 for one in found)
    assert max(float((a - b).abs().max()) for a, b in zip(found, expected, strict=True) if len(a)) <= tolerance


@pytest.mark.parametrize("adapter", [None, "all-linear"])
@pytest.mark.parametrize("name", sorted(FAMILIES))
def test_equals_plain_transformers(name: str, adapter: str | None) -> None:
    prompts, completions = make_inputs()
    model = build(name)
    if adapter is not None:
        model = with_lora(model, adapter)
    model.train()
    expected = one_by_one(model, prompts, completions)
    # many forward passes; one prompt is split in two
    assert_same(score(model, None, prompts, completions, max_tokens=48), expected)
    assert_same(score(model, None, prompts, completions), expected)  # a single forward pass


def test_an_adapter_on_the_head_counts() -> None:
    prompts, completions = make_inputs(1)
    model = with_lora(build("phi"), ["q_proj", "lm_head"])
    found = score(model, None, prompts, completions)
    assert_same(found, one_by_one(model, prompts, completions))
    with model.disable_adapter():
        without = score(model, None, prompts, completions)
        assert_same(without, one_by_one(model, prompts, completions))
    assert float((found[1] - without[1]).abs().max()) > 0.01


@pytest.mark.parametrize("loaded", ["eager", "sdpa"])
@pytest.mark.parametrize("attention", ["auto", "sdpa", "per_prompt"])
def test_however_the_model_was_loaded(loaded: str, attention: str) -> None:
    prompts, completions = make_inputs(2)
    model = build("llama", attention=loaded)
    assert_same(score(model, None, prompts, completions, attention=attention), one_by_one(model, prompts, completions))
    assert model.config._attn_implementation == loaded


def test_bfloat16_is_near() -> None:
    prompts, completions = make_inputs(3)
    exact = one_by_one(build("llama"), prompts, completions)
    model = build("llama", dtype=torch.bfloat16)
    found, plain = score(model, None, prompts, completions), one_by_one(model, prompts, completions)
    off = torch.cat([a - b for a, b in zip(found, exact, strict=True)]).abs().max()
    plain_off = torch.cat([a - b for a, b in zip(plain, exact, strict=True)]).abs().max()
    assert float(off) <= 2 * float(plain_off) + 0.1


def test_strings_are_tokenized_as_the_tokenizer_does(tiny_tokenizer: Any) -> None:
    """With a BOS before the prompt, none before completions, and nothing behind."""
    from tokenizers.processors import TemplateProcessing
    from transformers import PreTrainedTokenizerFast

    backend = type(tiny_tokenizer.backend_tokenizer).from_str(tiny_tokenizer.backend_tokenizer.to_str())
    backend.post_processor = TemplateProcessing(single="<eos> $A", special_tokens=[("<eos>", 0)])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<eos>")
    model = build("llama")
    prompts = ["A user watched:\n- Golden River\n-", "A user watched:\n-", ""]  # the last is the BOS alone
    completions = [[" Silent Garden\n", " Winter Mirror"], [" Paper Orchard"], [" Last Empire", "x", " Golden River\n"]]
    heads = [tokenizer(prompt)["input_ids"] for prompt in prompts]
    tails = [[tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts] for texts in completions]
    assert heads[2] == [0] and all(0 not in tail for texts in tails for tail in texts)
    expected = one_by_one(model, heads, tails)
    assert_same(score(model, tokenizer, prompts, completions), expected)
    assert_same(score(model, None, heads, tails), expected)
    mixed: Any = [np.asarray(heads[0]), torch.tensor(heads[1]), prompts[2]]
    assert_same(score(model, tokenizer, mixed, [tails[0], completions[1], tails[2]]), expected)


def everything_about(model: Any) -> dict[str, Any]:
    """What a caller could notice: modules, modes, weights, gradients, hooks and configuration."""
    modules = dict(model.named_modules())
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks", "_state_dict_hooks")
    return {
        "modules": {name: id(module) for name, module in modules.items()},
        "classes": {name: type(module) for name, module in modules.items()},
        "modes": {name: module.training for name, module in modules.items()},
        "attributes": {name: sorted(vars(module)) for name, module in modules.items()},
        "hooks": {name: [list(getattr(module, hook)) for hook in hooks] for name, module in modules.items()},
        "parameters": {name: (id(p), p.requires_grad, p._version, p.grad) for name, p in model.named_parameters()},
        "attention": [module.config._attn_implementation for module in modules.values() if hasattr(module, "config")],
        "config": model.config.to_dict(),
    }


class FailsAt(nn.Module):
    """A layer that raises at its n-th call."""

    def __init__(self, inner: nn.Module, call: int) -> None:
        super().__init__()
        self.inner, self.calls, self.call = inner, count(1), call

    def forward(self, *arguments: Any, **options: Any) -> Any:
        if next(self.calls) == self.call:
            raise RuntimeError("the layer failed")
        return self.inner(*arguments, **options)


@pytest.mark.parametrize("fails_at", [None, 1, 4, 6])  # before the model is switched, in the check, and in the middle of the work
def test_the_model_is_as_it_was(fails_at: int | None) -> None:
    prompts, completions = make_inputs(4)
    model = with_lora(build("llama"), "all-linear")
    model.train()
    layers = model.get_base_model().model.layers
    layers[0].mlp.eval()  # modes may differ within a model
    layers[1].self_attn.q_proj.base_layer.weight.requires_grad_(True)
    if fails_at is not None:
        layers[2].mlp = FailsAt(layers[2].mlp, fails_at)
    ids = torch.tensor([prompts[1]])
    before = everything_about(model)
    with torch.no_grad():
        torch.manual_seed(0)
        logits = model(input_ids=ids).logits if fails_at is None else None
    state = torch.random.get_rng_state()
    if fails_at is None:
        score(model, None, prompts, completions, max_tokens=64)
    else:
        with pytest.raises((RuntimeError, UserError), match="the layer failed"):
            score(model, None, prompts, completions, max_tokens=64)
    assert torch.is_grad_enabled() and torch.equal(state, torch.random.get_rng_state())
    assert everything_about(model) == before
    if logits is not None:
        with torch.no_grad():
            torch.manual_seed(0)
            assert torch.equal(model(input_ids=ids).logits, logits)  # dropout included
        model(input_ids=ids, labels=ids).loss.backward()
        assert layers[1].self_attn.q_proj.base_layer.weight.grad is not None


def test_inside_other_modes() -> None:
    prompts, completions = make_inputs(5)
    model = build("gpt2")
    expected = one_by_one(model, prompts, completions)
    with torch.inference_mode():
        assert_same(score(model, None, prompts, completions), expected)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(score(model, None, prompts, completions), expected)


def test_no_prompts_and_no_completions() -> None:
    model = build("llama")
    assert score(model, None, [], []) == []
    assert_same([*score(model, None, [[1], [2, 3]], [[], []]), torch.zeros(1)], [torch.zeros(0), torch.zeros(0), torch.zeros(1)])


BAD_INPUTS = {
    "mismatch": (([[1]], [[[1]], [[2]]]), {}, r"prompts has 1 .* completions has 2"),
    "empty prompt": (([[1], []], [[[1]], [[2]]]), {}, r"prompts\[1\] .* no tokens"),
    "empty completion": (([[1], [2]], [[[1]], [[2], []]]), {}, r"completions\[1\]\[1\] .* no tokens"),
    "id too large": (([[1]], [[[1], [VOCAB]]]), {}, rf"completions\[0\]\[1\] .*{VOCAB}.* 0 to {VOCAB - 1}"),
    "id below zero": (([[-1]], [[[1]]]), {}, r"prompts\[0\] .*-1"),
    "no numbers": (([[1.5]], [[[1]]]), {}, r"prompts\[0\] .*whole numbers"),
    "nested": (([[[1, 2]]], [[[1]]]), {}, r"prompts\[0\] .*flat"),
    "different lengths": (([[1, [2]]], [[[1]]]), {}, r"prompts\[0\] .*flat"),
    "with a gradient": (([torch.ones(2, requires_grad=True)], [[[1]]]), {}, r"prompts\[0\] .*whole numbers"),
    "one string": (("abc", [[[1]]]), {}, r"prompts .*must be a list"),
    "strings in place of lists": (([[1]], ["ab"]), {}, r"completions\[0\] .*must be a list"),
    "no tokenizer": ((["a"], [[[1]]]), {}, r"tokenizer is None"),
    "budget": (([[1] * 20], [[[1], [1] * 5]]), {"max_tokens": 23}, r"max_tokens \(23\) .*completions\[0\]\[1\] \(24 tokens\)"),
    "budget as text": (([[1]], [[[1]]]), {"max_tokens": "8"}, r"max_tokens \('8'\) must be a whole number"),
    "positions": (([[1] * 128], [[[1], [1, 2]]]), {}, r"completions\[0\]\[1\] takes 129 positions .* 128"),
    "attention": (([[1]], [[[1]]]), {"attention": "fast"}, r"attention \('fast'\)"),
    "flex on a CPU": (([[1]], [[[1]]]), {"attention": "flex"}, r"attention=flex .*CUDA"),
}


@pytest.mark.parametrize("name", sorted(BAD_INPUTS))
def test_what_cannot_be_scored_is_one_clear_error(name: str) -> None:
    inputs, options, words = BAD_INPUTS[name]
    model = build("llama")
    with pytest.raises(UserError, match=words):
        score(model, None, *inputs, **options)
    assert model.config._attn_implementation == "sdpa"


def test_a_name_in_place_of_a_tokenizer_is_refused() -> None:
    with pytest.raises(UserError, match=r"completions\[0\]\[1\] holds half a character \(U\+D83D at place 2\)"):
        score(build("llama"), lambda texts, **_: pytest.fail("it was tokenized"), [[1]], [["ok", "a \ud83d"]])
    with pytest.raises(UserError, match="tokenizer is of type str"):
        score(build("llama"), "gpt2", ["a"], [["b"]])


def test_as_many_positions_as_the_model_has_are_fine() -> None:
    for name in ("llama", "gpt2"):
        model = build(name)
        inputs: Any = ([[1] * 128], [[[1]]])
        with torch.no_grad():
            model.eval()
            last = torch.log_softmax(model(input_ids=torch.tensor(inputs[0])).logits[0, -1], -1)
        assert_same(score(model, None, *inputs), [last[1:2]])


REFUSED = {
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0, eos_token_id=0
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=61, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0),
    "falcon-alibi": lambda: transformers.FalconConfig(
        vocab_size=61, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True
    ),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.25),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_cannot_share_prompts_is_refused(name: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(REFUSED[name]())
    with pytest.raises(UserError, match=r"model is a .*choose a decoder"):
        score(model, None, [[1]], [[[2]]])


def test_other_things_in_place_of_a_model_are_refused() -> None:
    t5 = transformers.T5Config(vocab_size=61, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    decoder = build("llama").model
    with torch.device("meta"):
        empty = transformers.AutoModelForCausalLM.from_config(FAMILIES["llama"]())
    for model, words in (
        (nn.Linear(2, 2), "Linear; give a causal"),
        (empty, "meta device"),
        ("gpt2", "str; give a causal"),
        (transformers.T5ForConditionalGeneration(t5), "encoder-decoder"),
        (decoder, "no language-model head"),
    ):
        with pytest.raises(UserError, match=words):
            score(model, None, [[1]], [[[2]]])


def test_adapters_that_work_outside_the_modules_are_refused() -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model

    for config in (
        PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
    ):
        with pytest.raises(UserError, match="adapter of kind P"):
            score(get_peft_model(build("llama"), config), None, [[1]], [[[2]]])


def test_a_model_that_a_packed_batch_cannot_reproduce_is_refused() -> None:
    """The check compares with the model's own forward pass, so it also finds changes that are made after the decoder."""

    class Cooler(transformers.LlamaForCausalLM):  # type: ignore[misc]
        def forward(self, *arguments: Any, **options: Any) -> Any:
            output = super().forward(*arguments, **options)
            output.logits = output.logits / 2
            return output

    model = Cooler(FAMILIES["llama"]())
    with pytest.raises(UserError, match=r"model: .*log-probs change"):
        score(model, None, [[1]], [[[2]]])
    broken = build("llama")
    broken.model.norm.weight.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"model: .*not finite"):
        score(broken, None, [[1]], [[[2]]])
