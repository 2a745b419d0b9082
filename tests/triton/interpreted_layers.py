"""Liger's layers in Triton's interpreter on the CPU, as models.fused_layers puts them into models: against float64 and plain layers.

pytest does not collect this file by name: test_layers.py runs it in a process with TRITON_INTERPRET=1.
"""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from interpreter_rounding import round_to_nearest
from liger_kernel.ops import geglu, rms_norm
from random_prompts import random_tree
from torch import nn
from torch.func import functional_call
from triton import language as tl
from triton.runtime import interpreter
from worker_processes import run_workers

from benchmarks.acceptance import compare, results
from rec_dist.errors import UserError
from rec_dist.models import fused_layers as layers
from rec_dist.models.attention_paths import run_decoder
from rec_dist.models.fused_layers import FAMILIES, check_fused, fuse_layers, fused_layers, plain_layers
from rec_dist.models.language import LoraSpec, add_lora, load_language_model
from rec_dist.models.scorer import Scorer, check_scorer
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts

DTYPES = (torch.float32, torch.bfloat16)
VOCAB, WIDTH = 64, 32
LORA = LoraSpec(rank=4, alpha=8.0, dropout=0.0, target_modules="all-linear")


_launched = interpreter._implicit_cvt


def _launched_with_floats(argument: Any) -> Any:
    """A number in float32 is a tensor in a kernel, as an integer is; the interpreter leaves it a number."""
    if not isinstance(argument, float):
        return _launched(argument)
    return tl.tensor(interpreter.TensorHandle(np.array([argument], dtype=np.float32), tl.float32), tl.float32)


_binary_op = interpreter.InterpreterBuilder.binary_op


def _binary_op_in_float32(self: Any, left: Any, right: Any, op: Any) -> Any:
    """The interpreter stores bfloat16 as integers and computes with these; a GPU computes in float32 and rounds."""
    if left.dtype.scalar != tl.bfloat16:
        return _binary_op(self, left, right, op)
    convert = interpreter._convert_float
    values = [convert(side.data, tl.bfloat16, tl.float32, None).view(np.float32) for side in (left, right)]
    return interpreter.TensorHandle(convert(op(*values), tl.float32, tl.bfloat16, None), tl.bfloat16)


def complete_interpreter(setattr: Callable[[Any, str, Any], None]) -> None:
    """Adds what these kernels need and the interpreter lacks: floats as arguments, sums and products in bfloat16, and two
    functions that on a GPU come from NVIDIA's libdevice."""
    setattr(interpreter, "_implicit_cvt", _launched_with_floats)
    setattr(interpreter.InterpreterBuilder, "binary_op", _binary_op_in_float32)
    setattr(rms_norm, "rsqrt", lambda x: 1 / tl.sqrt(x))
    setattr(geglu, "tanh", lambda x: 2 * tl.sigmoid(2 * x) - 1)


@pytest.fixture(autouse=True)
def completed(monkeypatch: pytest.MonkeyPatch) -> None:
    round_to_nearest(monkeypatch)
    complete_interpreter(monkeypatch.setattr)


def config_of(family: str) -> Any:
    """Two layers of the family, with every option that its layers have: biases, norms of q and k, both kinds of attention."""
    config = transformers.AutoConfig.for_model(
        family,
        vocab_size=VOCAB,
        hidden_size=WIDTH,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        tie_word_embeddings=False,
        sliding_window=6,
    )
    config.pad_token_id = None
    return config


def model_of(family: str, dtype: torch.dtype, *, fused: bool) -> Any:
    """The same random weights for each dtype, with or without fused layers; norms differ from their initial ones and zeros."""
    torch.manual_seed(0)
    model: Any = transformers.AutoModelForCausalLM.from_config(config_of(family), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.add(torch.randn_like(parameter) * 0.2).bfloat16())
    if fused:
        fuse_layers(model)
    return model.to(dtype)


def packed(seed: int = 0, prompts: int = 2) -> PackedBatch:
    """Prompts whose completions continue after their branch points: positions repeat and jump back."""
    rng = np.random.default_rng(seed)
    return pack_prompts([
        random_tree(rng, vocab_size=VOCAB, prompt=5, groups=2, max_negatives=2).grouped_prompt() for _ in range(prompts)
    ])  # fmt: skip


def op_of(module: nn.Module, dtype: torch.dtype) -> Any:
    """leaves (x, then the parameters of `module`) -> its result."""
    names = [name for name, _ in module.named_parameters()]

    def run(x: torch.Tensor, *weights: torch.Tensor) -> list[torch.Tensor]:
        own = module if x.dtype == dtype else module.double()
        return [functional_call(own, dict(zip(names, weights, strict=True)), (x,))]

    return run


class Half(nn.Module):
    """A copy of the first or second half of each row."""

    def __init__(self, number: int) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x.chunk(2, dim=-1)[self.number].clone()


def without_products(mlp: Any) -> nn.Module:
    """Matrix products mix errors, so that single elements cannot be compared."""
    mlp.gate_proj, mlp.up_proj, mlp.down_proj = Half(0), Half(1), nn.Identity()
    return mlp


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("kind", ["RMSNorm", "MLP"])
def test_a_layer_is_as_close_to_the_truth_as_the_plain_one(family: str, kind: str, dtype: torch.dtype) -> None:
    find = lambda model: model.model.norm if kind == "RMSNorm" else without_products(model.model.layers[0].mlp)
    truth, plain, fused = (find(model_of(family, dtype, fused=fused)) for fused in (False, False, True))
    assert type(fused).__name__.startswith("Fused")
    width = WIDTH if kind == "RMSNorm" else 2 * WIDTH
    x = torch.randn(1, 11, width, generator=torch.Generator().manual_seed(1)).to(dtype).requires_grad_()
    leaves = [x, *(parameter.detach().requires_grad_() for parameter in plain.parameters())]
    assert compare(op_of(truth, dtype), op_of(plain, dtype), op_of(fused, dtype), leaves) == []


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotation_is_as_close_to_the_truth_as_the_plain_one(dtype: torch.dtype) -> None:
    plain = transformers.models.llama.modeling_llama.apply_rotary_pos_emb
    generator = torch.Generator().manual_seed(2)
    q, k = (torch.randn(1, 9, heads, 8, generator=generator).to(dtype).requires_grad_() for heads in (6, 2))
    angles = torch.randn(1, 9, 4, generator=generator).repeat(1, 1, 2)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)

    def run(rotate: Any) -> Any:
        # Times 1, since the fused one rotates in place and leaves must stay.
        return lambda q, k: list(rotate(*((1 * x).transpose(1, 2) for x in (q, k)), cos.to(q.dtype), sin.to(q.dtype)))

    assert compare(run(plain), run(plain), run(layers._rope), [q, k]) == []


def test_norms_of_many_short_rows_take_another_kernel() -> None:
    """Norms of q and k in a batch of 32,768 heads and more. In float32, because the interpreter takes minutes for bfloat16."""
    dtype = torch.float32
    model = transformers.models.qwen3.modeling_qwen3.Qwen3RMSNorm
    plain, fused = model(8).to(dtype), model(8).to(dtype)
    fused.__class__ = layers._fused(model, layers._norm_forward(FAMILIES["qwen3"]))
    x = torch.randn(1, 4096, 8, 8, generator=torch.Generator().manual_seed(3)).to(dtype).requires_grad_()
    weight = torch.randn(8).to(dtype).requires_grad_()
    assert compare(op_of(model(8), dtype), op_of(plain, dtype), op_of(fused, dtype), [x, weight]) == []


class Decoder(nn.Module):
    """The hidden states of a packed batch."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, batch: PackedBatch) -> torch.Tensor:
        return run_decoder(self.model, batch)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_model_on_a_packed_batch(family: str, dtype: torch.dtype) -> None:
    """Hidden states and all gradients: the error against float64 is that of the plain model. Every layer is fused."""
    batch, models = packed(), {name: Decoder(model_of(family, dtype, fused=name == "fused")) for name in ("plain", "fused")}
    models["truth"] = Decoder(model_of(family, torch.float64, fused=False))
    kinds = [type(layer).__name__ for layer in fused_layers(models["fused"])]
    assert {kind: sum(name.endswith(kind) for name in kinds) for kind in ("MLP", "Attention")} == {"MLP": 2, "Attention": 2}
    assert len(kinds) == 4 + sum(type(layer).__name__.endswith("RMSNorm") for layer in models["plain"].modules())
    names = [name for name, _ in models["plain"].named_parameters()]
    assert names == [name for name, _ in models["fused"].named_parameters()]
    leaves = [parameter.detach().requires_grad_() for parameter in models["plain"].parameters()]

    def run(name: str) -> list[torch.Tensor]:
        own = [leaf.double().detach().requires_grad_() for leaf in leaves] if name == "truth" else leaves
        used = [n for n in names if "lm_head" not in n]
        kept = [leaf for n, leaf in zip(names, own, strict=True) if n in used]
        return results(lambda *w: [functional_call(models[name], dict(zip(used, w, strict=True)), (batch,))], kept)

    truth, plain, fused = run("truth"), run("plain"), run("fused")
    rounding = {torch.float32: 2.0**-22, torch.bfloat16: 2.0**-9}[dtype]
    for place, (exact, own, other) in enumerate(zip(truth, plain, fused, strict=True)):
        error, allowed = (float((exact - values.double()).norm()) for values in (other, own))
        assert error <= 1.25 * allowed + rounding * float(exact.norm()), (["states", *names][place], error, allowed)


def scorer_of(model: nn.Module) -> Scorer:
    return Scorer(model, lambda logps, batch: (-logps.sum(), logps.new_tensor(float(len(logps))), {}), ())


def test_the_check_accepts_the_layers_and_leaves_them_fused() -> None:
    scorer = scorer_of(model_of("llama", torch.float32, fused=True)).eval()
    before = [type(layer) for layer in fused_layers(scorer)]
    with plain_layers(scorer):
        assert fused_layers(scorer) == []
    with torch.no_grad():
        check_scorer(scorer, lambda batch: scorer(batch)[2], dtype=torch.float32)
    assert [type(layer) for layer in fused_layers(scorer)] == before != []


def test_the_check_rejects_layers_that_compute_something_else(monkeypatch: pytest.MonkeyPatch) -> None:
    """With Gemma's norm a Llama would multiply by 1 + weight: every layer runs, and the results are wrong."""
    llama, gemma = FAMILIES["llama"], FAMILIES["gemma"]
    monkeypatch.setitem(FAMILIES, "llama", layers.Norm(gemma.offset, gemma.casting, llama.eps))
    scorer = scorer_of(model_of("llama", torch.float32, fused=True)).eval()
    with torch.no_grad(), pytest.raises(UserError, match=r"model.fused_layers: .* set model.fused_layers=none"):
        check_fused(scorer, lambda: scorer(packed())[2], torch.float32)


@pytest.mark.parametrize("again", [False, True])
def test_with_lora_and_recomputed_layers(tmp_path: Path, again: bool) -> None:
    """The loss and the adapter's gradients are those of the plain model, and so are the names in its files."""
    model_of("qwen3", torch.float32, fused=False).save_pretrained(tmp_path)
    found = []
    for fused in (False, True):
        model: Any = load_language_model(tmp_path, dtype=torch.float32, activation_checkpointing=again)
        if fused:
            fuse_layers(model)
        scorer = scorer_of(add_lora(model, LORA, seed=0, weights=None, keep_reference=False)).train()
        with torch.no_grad():
            for name, parameter in scorer.named_parameters():
                if "lora_B" in name:
                    parameter.normal_(std=0.3, generator=torch.Generator().manual_seed(len(name)))
        loss = scorer(packed())[0]
        loss.backward()
        found.append(
            (loss.detach(), {n: p.grad for n, p in scorer.named_parameters() if p.grad is not None}, scorer.state_dict())
        )
    (plain, gradients, weights), (loss, own, state) = found
    assert list(weights) == list(state)
    torch.testing.assert_close(loss, plain, rtol=1e-5, atol=1e-5)
    assert own.keys() == gradients.keys() != set()
    for name, gradient in gradients.items():
        torch.testing.assert_close(own[name], gradient, rtol=1e-3, atol=1e-4 * float(gradient.abs().max()), msg=name)


def _train(world: Any, job: tuple[str, bool]) -> dict[str, Any]:
    """Losses of two steps under ZeRO stage 3 on this rank."""
    from rec_dist.engine import process_group
    from rec_dist.engine.engine import Engine, sharded_loading
    from rec_dist.engine.settings import EngineSettings

    folder, fused = job
    complete_interpreter(setattr)
    with process_group.joined(world):
        settings = EngineSettings(zero_stage=3, bf16=False, max_grad_norm=0.0, hidden_size=1, max_live_parameters=1)
        with sharded_loading(settings):
            model = load_language_model(Path(folder), dtype=torch.float32, activation_checkpointing=True)
            if fused:
                fuse_layers(model)
            module = scorer_of(add_lora(model, LORA, seed=0, weights=None, keep_reference=False))
        trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
        engine = Engine(module, settings, device="cpu", optimizer=torch.optim.AdamW(trainable, lr=1e-2))
        engine.train_mode(False)
        check_scorer(module, lambda batch: engine.score(batch)[2].float().cpu(), dtype=torch.float32)
        engine.train_mode(True)
        losses = []
        for step in range(2):
            loss = engine.forward(packed(seed=step, prompts=1))[0]
            engine.backward(loss, last=True)
            engine.step(1e-2)
            losses.append(float(loss.detach()))
        return {"losses": losses}


def test_two_workers_under_zero_3_take_the_same_course(tmp_path: Path) -> None:
    """Each weight, those of norms included, is gathered when its layer is called and released after."""
    folder = tmp_path / "model"
    model_of("llama", torch.float32, fused=False).save_pretrained(folder)
    runs = [run_workers(_train, [(str(folder), fused)] * 2, tmp_path / str(fused)) for fused in (False, True)]
    plain, fused = (np.asarray([result["losses"] for result in run]) for run in runs)
    assert np.abs(np.diff(plain, axis=1)).min() > 1e-3
    np.testing.assert_allclose(fused, plain, rtol=1e-4)
