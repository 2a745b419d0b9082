"""The claim that everything depends on: a shared prompt gives the log-probs and gradients of prompts written out one by one.

The oracle is transformers alone: each prompt + completion through the whole model, log_softmax, sum. The models are tiny and
random with large weights, so that a row that sees one token too many is off by far more than the tolerance (checked for every
model).
"""

from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from random_prompts import Tree, random_tree
from torch import Tensor

from rec_dist.errors import UserError
from rec_dist.models import per_prompt
from rec_dist.models.attention import visible
from rec_dist.models.language import load_language_model
from rec_dist.models.past_prompts import keep, past_of
from rec_dist.models.per_prompt import PER_PROMPT, prompt_masks
from rec_dist.models.prompt_cache import PromptCache
from rec_dist.models.scorer import Scorer, check_branching
from rec_dist.models.token_tree import TokenTree
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts

VOCAB = 61
WINDOW = 5  # shorter than the prompts
COMMON = {
    "vocab_size": VOCAB,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "initializer_range": 0.2,
    "bos_token_id": None,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
MIXED = ["sliding_attention", "full_attention", "sliding_attention"]
GEMMA = {**COMMON, "head_dim": 8, "query_pre_attn_scalar": 8, "sliding_window": WINDOW, "layer_types": MIXED}
GPT2 = {"vocab_size": VOCAB, "n_positions": 64, "n_embd": 32, "n_layer": 2, "n_head": 4, "initializer_range": 0.2}
GPT2 |= {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0}


def configs() -> dict[str, Any]:
    t = transformers
    return {
        "llama-tied": t.LlamaConfig(**COMMON, tie_word_embeddings=True),
        "llama-untied": t.LlamaConfig(**COMMON, tie_word_embeddings=False, attention_bias=True, mlp_bias=True),
        "qwen2": t.Qwen2Config(**COMMON, tie_word_embeddings=True),
        "qwen2-sliding": t.Qwen2Config(**COMMON, use_sliding_window=True, sliding_window=WINDOW, max_window_layers=1),
        "qwen3": t.Qwen3Config(**COMMON, head_dim=8, tie_word_embeddings=False),
        "mistral-sliding": t.MistralConfig(**COMMON, sliding_window=WINDOW),
        "gemma2": t.Gemma2Config(**GEMMA, attn_logit_softcapping=2.0, final_logit_softcapping=3.0),
        "gemma3": t.Gemma3TextConfig(**GEMMA),
        "gpt2-tied": t.GPT2Config(**GPT2, tie_word_embeddings=True),
        "gpt2-untied": t.GPT2Config(**GPT2, tie_word_embeddings=False, attn_pdrop=0.3, resid_pdrop=0.3, embd_pdrop=0.3),
        "phi": t.PhiConfig(**COMMON, tie_word_embeddings=False),  # its head has a bias
    }


ALL = sorted(configs())
MakeScorer = Callable[[Path], Scorer]
SLIDING = ["gemma2", "gemma3", "mistral-sliding", "qwen2-sliding"]


def save_model(config: Any, folder: Path) -> Path:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(3)
        model = transformers.AutoModelForCausalLM.from_config(config)
        for parameter in model.parameters():  # norms at 1 and biases at 0 would hide a wrong one
            if parameter.dim() == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def folder_of(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root, made = tmp_path_factory.mktemp("models"), configs()

    def folder(name: str) -> Path:
        return root / name if (root / name).exists() else save_model(made[name], root / name)

    return folder


def weighted_loss(logps: Tensor, batch: PackedBatch) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """A weight for each completion from its targets, so that exchanging two completions always shows."""
    offsets = batch.completion_offsets.tolist()
    weights = torch.stack([torch.sin(batch.targets[a:b].sum().float()) for a, b in pairwise(offsets)])
    return (weights * logps).sum(), logps.new_zeros(()), {}


@pytest.fixture(params=["sdpa", "auto", "padded"])
def scorer_of(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> MakeScorer:
    """Under the dense mask, and as `auto` chooses on a CPU: prompt by prompt, except for soft-capped scores.

    padded: with the backward pass in float32 that bfloat16 has, whose rounding would hide a wrong mask.
    """
    wanted = request.param
    if wanted == "padded":
        wanted = "auto"
        monkeypatch.setattr(per_prompt, "has_padded_backward", lambda dtype, device: True)

    def make(folder: Path) -> Scorer:
        model = load_language_model(folder, dtype=torch.float32, attention=wanted)
        return Scorer(model, weighted_loss, ()).train()  # train: dropout must be off

    return make


def oracle_of(folder: Path, **changes: Any) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", **changes).eval()


def replicated_logps(model: Any, trees: list[Tree]) -> Tensor:
    """(N,) log-probs from one forward pass a completion, without any of our code."""
    sums = []
    for prompt, answer in [pair for tree in trees for pair in tree.written_out()]:
        logits = model(input_ids=torch.tensor([prompt + answer])).logits[0].float()
        logps = torch.log_softmax(logits, dim=-1)
        places = torch.arange(len(prompt) - 1, len(prompt) + len(answer) - 1)
        sums.append(logps[places, torch.tensor(answer)].sum())
    return torch.stack(sums)


def forest(seed: int = 0) -> list[Tree]:
    rng = np.random.default_rng(seed)
    shapes = [(14, 3), (1, 1), (9, 4), (17, 2)]  # prompt tokens, groups; one prompt of a single token
    return [random_tree(rng, vocab_size=VOCAB, prompt=prompt, groups=groups) for prompt, groups in shapes]


def micro_batch(trees: list[Tree]) -> PackedBatch:
    return pack_prompts([tree.grouped_prompt() for tree in trees])


def logps_of(scorer: Scorer, trees: list[Tree]) -> list[Tensor]:
    """Log-probs of one micro-batch, one tensor for each tree."""
    sizes = [len(tree.written_out()) for tree in trees]
    with torch.no_grad():
        return list(scorer(micro_batch(trees))[2].split(sizes))


@pytest.mark.parametrize("name", ALL)
def test_a_packed_batch_has_the_log_probs_of_plain_transformers(
    name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer
) -> None:
    trees = forest()
    with torch.no_grad():
        expected = replicated_logps(oracle_of(folder_of(name)), trees)
        found = scorer_of(folder_of(name))(micro_batch(trees))[2]
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() <= 1e-4


@pytest.mark.parametrize("name", SLIDING)
def test_the_window_is_felt(name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer) -> None:
    """Otherwise the test above could not distinguish a sliding layer from a full one."""
    trees = forest()
    with torch.no_grad():
        wide = replicated_logps(oracle_of(folder_of(name), sliding_window=64), trees)
        found = scorer_of(folder_of(name))(micro_batch(trees))[2]
    assert (found - wide).abs().max() > 1e-2


@pytest.mark.parametrize("name", ["llama-tied", "llama-untied", "gpt2-tied", "gpt2-untied", "gemma2", "mistral-sliding"])
def test_gradients_equal_plain_transformers(name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer) -> None:
    trees, oracle, scorer = forest(1), oracle_of(folder_of(name)), scorer_of(folder_of(name))
    batch = micro_batch(trees)
    weighted_loss(replicated_logps(oracle, trees), batch)[0].backward()
    scorer(batch)[0].backward()
    expected = {key: parameter.grad for key, parameter in oracle.named_parameters()}
    found = {key.removeprefix("model."): parameter.grad for key, parameter in scorer.named_parameters()}
    assert set(found) == set(expected)
    assert max(float(grad.abs().max()) for grad in expected.values()) > 0.1
    for key, grad in expected.items():
        assert (found[key] - grad).abs().max() <= 1e-4 * (1 + grad.abs().max()), key


@pytest.mark.parametrize("name", ALL)
def test_packing_order_and_batch_mates_change_nothing(name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer) -> None:
    trees, scorer = forest(2), scorer_of(folder_of(name))
    alone = [logps_of(scorer, [tree])[0] for tree in trees]
    mate = random_tree(np.random.default_rng(9), vocab_size=VOCAB, prompt=20, groups=3)
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 0], [1, 3], [3, 3]):
        together = logps_of(scorer, [mate, *(trees[i] for i in order), mate])[1:-1]
        for place, index in enumerate(order):
            scale = alone[index].abs().clamp(min=1)  # a sum of -60 in float32 has steps of 4e-6
            assert ((together[place] - alone[index]).abs() / scale).max() <= 1e-5


@pytest.mark.parametrize("name", ALL)
def test_check_branching_passes_the_models_we_support(name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer) -> None:
    scorer = scorer_of(folder_of(name))
    with torch.no_grad():
        check_branching(lambda batch: scorer(batch)[2], vocab_size=VOCAB, dtype=torch.float32)


@pytest.mark.parametrize("name", ALL)
def test_check_branching_refuses_attention_that_drops_the_mask(
    name: str, folder_of: Callable[[str], Path], scorer_of: MakeScorer
) -> None:
    """Under transformers' own causal mask over the batch, every row sees the prompts and completions before it."""
    scorer = scorer_of(folder_of(name))
    base = scorer.base

    def score(batch: PackedBatch) -> Tensor:
        output = base.base_model(input_ids=batch.input_ids[None], position_ids=batch.positions[None], use_cache=False)
        return base.get_output_embeddings()(output.last_hidden_state[0], batch)

    with torch.no_grad(), pytest.raises(UserError, match=r"model\.path.*share a prompt"):
        check_branching(score, vocab_size=VOCAB, dtype=torch.float32)


def test_check_branching_refuses_completions_that_see_each_other() -> None:
    """A bag-of-tokens model over a mask without the rule for completions, the subtlest way to be wrong; and NaN."""
    table = torch.randn(VOCAB, VOCAB, generator=torch.Generator().manual_seed(0))

    def score(batch: PackedBatch, sees_siblings: bool) -> Tensor:
        mask = visible(batch)
        if sees_siblings:
            same = batch.prompt_ids[:, None] == batch.prompt_ids[None, :]
            mask = same & (torch.arange(batch.num_tokens)[:, None] >= torch.arange(batch.num_tokens)[None, :])
        hidden = (mask.float() @ table[batch.input_ids]) / mask.sum(1, keepdim=True)
        scored = torch.log_softmax(hidden[batch.rows], -1)[torch.arange(len(batch.rows)), batch.targets]
        offsets = batch.completion_offsets.tolist()
        return torch.stack([scored[a:b].sum() for a, b in pairwise(offsets)])

    check_branching(lambda batch: score(batch, False), vocab_size=VOCAB, dtype=torch.float32)
    with pytest.raises(UserError, match="keep to the mask"):
        check_branching(lambda batch: score(batch, True), vocab_size=VOCAB, dtype=torch.float32)
    with pytest.raises(UserError, match="not finite"):
        check_branching(lambda batch: score(batch, False) * float("nan"), vocab_size=VOCAB, dtype=torch.float32)


REFUSED = {  # has a state, takes no mask, counts distances in rows, scales logits
    "mamba": lambda: transformers.MambaConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, state_size=4, pad_token_id=0, eos_token_id=0
    ),
    "bloom": lambda: transformers.BloomConfig(vocab_size=VOCAB, hidden_size=16, n_layer=1, n_head=2, eos_token_id=0),
    "falcon-alibi": lambda: transformers.FalconConfig(
        vocab_size=VOCAB, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, alibi=True
    ),
    "cohere": lambda: transformers.CohereConfig(**COMMON, logit_scale=0.25),
}


@pytest.mark.parametrize("name", sorted(REFUSED))
def test_a_model_that_cannot_take_the_mask_is_refused_at_loading(name: str, tmp_path: Path) -> None:
    folder = save_model(REFUSED[name](), tmp_path / name)
    with pytest.raises(UserError, match=r"model\.path"):
        load_language_model(folder, dtype=torch.float32)


def test_an_encoder_decoder_is_refused_at_loading(tmp_path: Path) -> None:
    config = transformers.T5Config(vocab_size=VOCAB, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=2)
    transformers.T5ForConditionalGeneration(config).save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"model\.path"):
        load_language_model(tmp_path, dtype=torch.float32)


def test_a_folder_without_a_model_is_the_users_mistake(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no model that loads"):
        load_language_model(tmp_path, dtype=torch.float32)


@pytest.mark.parametrize("joined", [False, True])
@pytest.mark.parametrize("name", ["llama-tied", "mistral-sliding", "gpt2-tied", "gemma3"])
def test_prompt_by_prompt_is_the_dense_mask(name: str, joined: bool, folder_of: Callable[[str], Path]) -> None:
    """Compares log-probs and every gradient.

    Some prompts share a call and some do not; they have many completions or none, and padded rows.
    """
    rng = np.random.default_rng(5)
    sizes = [(30, 6), (2, 1), (25, 2), (29, 1), (30, 2)]
    trees = [random_tree(rng, vocab_size=VOCAB, prompt=prompt, groups=groups) for prompt, groups in sizes]
    plain = micro_batch(trees)
    batch = plain.padded_to(plain.num_tokens + 3, joined=joined)
    scorers = {}
    for way in ("sdpa", "per_prompt"):
        model: Any = load_language_model(folder_of(name), dtype=torch.float32, attention=way)
        assert model.config._attn_implementation == {"sdpa": "sdpa", "per_prompt": PER_PROMPT}[way]
        scorers[way] = Scorer(model, weighted_loss, ())
    masks = prompt_masks(batch, model.config, torch.float32)
    calls = [call for mask in (masks.values() if isinstance(masks, dict) else [masks]) for call in mask.calls]
    # 30, 29 and 30 tokens are about the same length. Where all layers slide, only padding rows are plainly causal.
    assert max(map(len, calls)) == (1 if joined and name == "mistral-sliding" else 3)
    loss = {way: scorer(batch)[0] for way, scorer in scorers.items()}
    assert float((loss["sdpa"] - loss["per_prompt"]).detach().abs()) <= 1e-4 * (1 + float(loss["sdpa"].detach().abs()))
    for value in loss.values():
        value.backward()
    gradients = [{key: parameter.grad for key, parameter in scorer.named_parameters()} for scorer in scorers.values()]
    assert max(float(grad.abs().max()) for grad in gradients[0].values()) > 0.1
    for key, grad in gradients[0].items():
        assert (gradients[1][key] - grad).abs().max() <= 1e-4 * (1 + grad.abs().max()), key


def test_recomputed_activations_meet_their_own_masks(folder_of: Callable[[str], Path]) -> None:
    """Two micro-batches run forward before either goes backward.

    A mask kept outside the call would be the wrong one when layers run again.
    """
    gradients = []
    for again in (False, True):
        model = load_language_model(folder_of("llama-tied"), dtype=torch.float32, activation_checkpointing=again)
        scorer = Scorer(model, weighted_loss, ()).train()
        losses = [scorer(micro_batch(forest(seed)))[0] for seed in (1, 2)]
        sum(losses[1:], losses[0]).backward()
        gradients.append([parameter.grad for parameter in scorer.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        assert (plain - recomputed).abs().max() <= 1e-6 * (1 + plain.abs().max())


def test_a_model_that_generates_keeps_its_own_mask(folder_of: Callable[[str], Path]) -> None:
    """Called without a batch, as in generation, the attention is plain causal SDPA."""
    outputs = []
    for way in ("sdpa", "per_prompt"):
        model: Any = load_language_model(folder_of("llama-tied"), dtype=torch.float32, attention=way)
        prompt = torch.tensor([[3, 5, 7, 9], [0, 0, 4, 8]])
        mask = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 1]])
        with torch.no_grad():
            outputs.append(model(input_ids=prompt, attention_mask=mask).logits[mask.bool()])
    assert float((outputs[0] - outputs[1]).abs().max()) <= 1e-5


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_states_of_a_token_tree_are_those_of_plain_transformers(
    name: str, attention: str, folder_of: Callable[[str], Path]
) -> None:
    """Passes of one and of many rows, branches old and new; every earlier row is seen again, much later."""
    rng = np.random.default_rng(5)
    prompt = rng.integers(0, VOCAB, 11)
    base = load_language_model(folder_of(name), dtype=torch.float32, attention=attention).eval()
    oracle = oracle_of(folder_of(name))
    paths, expected, found = [[]], [], []  # of each row from the prompt's last on
    with torch.no_grad():
        tree = TokenTree(base, prompt)
        expected.append(oracle.base_model(input_ids=torch.from_numpy(prompt)[None]).last_hidden_state[0, -1])
        found.append(tree.last_hidden[0])
        for size in (1, 7, 3, 12):
            tokens, parents = rng.integers(0, VOCAB, size), []
            for token in tokens.tolist():
                parents.append(int(rng.integers(len(paths))))
                paths.append([*paths[parents[-1]], token])
            found += list(tree.run(tokens, [len(prompt) - 1 + parent for parent in parents]))
        assert len(tree) == len(prompt) + 23
        for path in paths[1:]:
            whole = torch.from_numpy(np.concatenate([prompt, path]).astype(np.int64))[None]
            expected.append(oracle.base_model(input_ids=whole).last_hidden_state[0, -1])
    assert max(len(path) for path in paths) > 4
    torch.testing.assert_close(torch.stack(found), torch.stack(expected), rtol=1e-4, atol=1e-4)


def test_a_token_tree_in_bfloat16_pads_its_rows(folder_of: Callable[[str], Path]) -> None:
    """Rows of padding change nothing and are not kept."""
    prompt, tokens = np.arange(11), np.asarray([3, 9, 5])
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        base = load_language_model(folder_of("llama-tied"), dtype=dtype).eval()
        with torch.no_grad():
            tree = TokenTree(base, prompt)
            first = tree.run(tokens, [10, 11, 10])
            states.append(torch.cat([first, tree.run(tokens, [12, 14, 13])]).float())
        assert len(tree) == 17
    assert (states[0] - states[1]).norm() <= 0.05 * states[0].norm()


@pytest.mark.parametrize("attention", ["auto", "sdpa"])
@pytest.mark.parametrize("name", ALL)
def test_prompts_that_begin_like_earlier_ones_score_as_plain_transformers(
    name: str, attention: str, folder_of: Callable[[str], Path]
) -> None:
    """Prompts that grow, shrink, repeat, and change in the middle, some new ones beside them, in batches of several."""
    rng = np.random.default_rng(7)
    scorer = Scorer(load_language_model(folder_of(name), dtype=torch.float32, attention=attention), weighted_loss, ()).eval()
    oracle, cache, prompts = oracle_of(folder_of(name)), PromptCache(1 << 30), [rng.integers(0, VOCAB, 12).tolist()]
    rows = 0
    with torch.no_grad():
        for _ in range(6):
            trees = []
            for base in (prompts[int(rng.integers(len(prompts)))] for _ in range(3)):
                same = int(rng.integers(len(base) + 1))
                prompt = [*base[:same], *rng.integers(0, VOCAB, int(rng.integers(0, 8))).tolist()] or [1]
                answers = [rng.integers(0, VOCAB, int(rng.integers(1, 6))).tolist() for _ in range(3)]
                trees.append(Tree(prompt, [(len(prompt) - 1, answers)]))
                prompts.append(prompt)
            batch = micro_batch(trees)
            past = past_of(batch, cache, 0, 0)
            logps = scorer(batch, past)[2]
            keep(past, cache, 0)
            rows += batch.num_tokens - len(past.rows)
            torch.testing.assert_close(logps, replicated_logps(oracle, trees), rtol=1e-4, atol=1e-4)
            torch.testing.assert_close(logps, scorer(batch)[2], rtol=1e-5, atol=1e-5)
    assert rows > 60
