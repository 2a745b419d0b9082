"""Every method on a pretended GPU: no operation mixes devices, and the host waits for the GPU once a step.

pytest does not collect this file by name: test_pretended_cuda.py runs it in a process with TRITON_INTERPRET=1. A step here is
that of a run, from the loader's micro-batches to the numbers of its row, with AdamW in DeepSpeed's place. Its loss and gradient
must be those of the same step on the CPU.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from p2rec_teacher import NUM_CATEGORIES, write_p2rec_teacher
from pretended.pretend import ROOT, MixedDevicesError, Pretence, outside, pretending

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.language_model import embedding, ranking
from rec_dist.methods.language_model.builders import model_spec
from rec_dist.methods.registry import build_task, find_initial_weights
from rec_dist.methods.task import Passes
from rec_dist.models import assemble
from rec_dist.models.language import load_language_model
from rec_dist.models.scorer import Scorer
from rec_dist.runtime.world import World
from rec_dist.training import reference
from rec_dist.training.loader import step_work
from rec_dist.training.loop import TrainStep

GPU = "cuda:0"
MAX_TOKENS = 200  # two micro-batches or more a step
UPDATE, REFERENCE = "rec_dist/training/loop.py:update", "rec_dist/training/reference.py:cached_reference"


# Not a wait: the pretence does not see that torch.vmap makes indices of its own on the GPU.
VMAP = {"torch/nn/attention/flex_attention.py:create_dense_one"}

LANGUAGE = {
    "sft": ("task.kind=sft",),
    "dpo": ("task.kind=dpo", "negatives.num=1"),
    "sdpo": ("task.kind=sdpo",),
    "msl": ("task.kind=msl", "task.msl.temperature=2"),
    "mppo": ("task.kind=mppo",),
    "dynamicpo": ("task.kind=dynamicpo", "negatives.num=5"),
    "recpo": ("task.kind=recpo",),
    "dmpo, shared prompts": ("task.kind=dmpo", "train.targets_per_prompt=4", "train.global_batch_size=8"),
    "all weights": ("task.kind=sdpo", "adapter.kind=none"),
    "bfloat16": ("task.kind=sdpo", "model.dtype=bfloat16"),
    "online reference": ("task.kind=sdpo", "task.reference=online"),
    "prompt by prompt": ("task.kind=sdpo", "model.attention=per_prompt"),
    "checkpointing": ("task.kind=sft", "model.activation_checkpointing=true"),
    "delrec_distill": (
        *("task.kind=delrec_distill", "adapter.kind=soft_prompt", "prompt.num_virtual=4", "task.delrec.top_h=3"),
        *("task.delrec.teacher=random", "negatives.num=3", "train.max_tokens_per_micro_batch=400"),
    ),
}
LESS_OFTEN = ("dpo", "mppo", "dynamicpo", "recpo", "all weights")  # S-DPO's loss with another pooling, and its head's weights
SEQUENTIAL = [
    pytest.param(kind, sampled, marks=pytest.mark.slow if sampled and kind != "sasrec" else ())
    for kind in ("sasrec", "gru4rec", "caser")
    for sampled in (0, 16)
]
Config = Callable[..., dict[str, Any]]


class PlainEngine:
    """Engine without DeepSpeed: the same calls on one device."""

    def __init__(self, module: Any, device: str) -> None:
        self.module, self.device = module.to(device), device
        self._optimizer = torch.optim.AdamW([weight for weight in module.parameters() if weight.requires_grad], foreach=False)

    def train_mode(self, on: bool) -> None:
        self.module.train(on)

    def forward(self, batch: Any) -> Any:
        return self.module(batch.to(self.device))

    @torch.no_grad()
    def score(self, batch: Any) -> Any:
        return self.module(batch.to(self.device))

    def backward(self, loss: torch.Tensor, *, last: bool) -> None:
        loss.backward()

    def step(self, lr: float, *, discard: bool = False) -> float:
        norm = torch.nn.utils.get_total_norm([weight.grad for weight in self.module.parameters() if weight.grad is not None])
        self._optimizer.step()
        self._optimizer.zero_grad()
        return float(norm)


def dense_flex(query: Any, key: Any, value: Any, *, block_mask: Any, scale: float, **options: Any) -> Any:
    """In place of FlexAttention's kernel: its mask function on every pair of rows, then SDPA."""
    rows = torch.arange(query.shape[2], device=query.device, dtype=torch.int32)
    zero = torch.zeros((), device=query.device, dtype=torch.int32)
    mask = block_mask.mask_mod(zero, zero, rows[:, None], rows[None, :])
    assert options["enable_gqa"] and rows.numel() % 256 == 0
    output = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale, enable_gqa=True)
    return output, type("Aux", (), {"lse": query.new_zeros(query.shape[:3], dtype=torch.float32)})


@pytest.fixture(autouse=True)
def without_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    """Replaces what only a real GPU runs, and the loader's thread, in which nothing is pretended."""
    from transformers.integrations import flex_attention

    def load_on_the_cpu(*arguments: Any, **options: Any) -> Any:
        with outside():
            return load_language_model(*arguments, **options)

    monkeypatch.setattr(flex_attention, "compile_friendly_flex_attention", dense_flex)
    monkeypatch.setattr(torch.nn.RNNBase, "flatten_parameters", lambda module: None)
    monkeypatch.setattr(reference, "prefetch", map)
    monkeypatch.setattr(assemble, "load_language_model", load_on_the_cpu)
    checks = torch.utils.checkpoint._allowed_determinism_checks_to_fns  # torch compares devices where no mode holds
    monkeypatch.setitem(checks, "default", checks["none"])


@pytest.fixture(scope="session")
def wide_model_dir(tmp_path_factory: pytest.TempPathFactory, tiny_tokenizer: Any) -> Path:
    """As tiny_model_dir, with heads of 16, the narrowest that FlexAttention takes."""
    from transformers import LlamaConfig, LlamaForCausalLM

    folder = tmp_path_factory.mktemp("wide-llama")
    sizes = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    more = {"num_key_value_heads": 2, "max_position_embeddings": 512, "tie_word_embeddings": True}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        LlamaForCausalLM(LlamaConfig(vocab_size=320, bos_token_id=None, eos_token_id=0, **sizes, **more)).save_pretrained(folder)
    tiny_tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def config_of(tiny_config: Config, wide_model_dir: Path, tmp_path: Path) -> Callable[..., RunConfig]:
    small = ("train.global_batch_size=4", f"train.max_tokens_per_micro_batch={MAX_TOKENS}", f"model.path={wide_model_dir}")

    def make(*changes: str) -> RunConfig:
        return RunConfig.model_validate(tiny_config(tmp_path / "run", *small, *changes))

    return make


@dataclass(frozen=True)
class Step:
    """The first step of a run: what it came to, and what happened in the pass over the references, in the passes of the
    micro-batches, and in the update."""

    numbers: dict[str, float]
    num_batches: int
    compared: Pretence
    passes: Pretence
    update: Pretence

    def show(self, title: str) -> None:
        """Print every wait."""
        for name in ("compared", "passes", "update"):
            print(f"{title}, {name}:", *(f"\n  {wait}" for wait in getattr(self, name).waits))


def first_step(config: RunConfig, device: str, folder: Path, pretence: Pretence) -> Step:
    world, max_tokens = World(device=device), config.train.max_tokens_per_micro_batch
    task = build_task(config, find_initial_weights(config), device)
    module = task.model.build()
    engine: Any = PlainEngine(module, device)
    engine.train_mode(False)
    score = lambda batch: engine.score(batch)[2].float().cpu()
    task.model.check(module, score)
    task.first_pass(Passes(module, score, folder / f"run-{world.device}", world, max_tokens, lambda done, total: None))
    pretence.take()
    logps: Any = reference.NoReference()
    if task.reference is not None and config.task.reference == "online":
        logps = reference.OnlineReference(engine, device)
    elif task.reference is not None:
        store, _ = reference.cached_reference(
            engine, task, task.reference, folder / device, max_tokens=max_tokens, world=world, report=lambda done, total: None
        )
        logps = reference.CachedReference(store)
    engine.train_mode(True)
    plan = step_work(task, 0, max_tokens=max_tokens, world=world, look_up=logps.look_up)
    step = TrainStep(engine, task, logps, task.exchange(module), lambda batch: None, world)
    compared = pretence.take()
    sums = step.forward_backward(plan)
    passes = pretence.take()
    result = step.update(plan, sums, lr=1e-3, flags=(False, True))
    assert result.flags == (False, True) and result.bad_users is None
    return Step(result.numbers, len(plan.batches), compared, passes, pretence.take())


def check(config: RunConfig, folder: Path, *, rel: float = 1e-4, first: dict[str, int] | None = None) -> Step:
    """Asserts the budget of waits, and loss and gradient of the same step on the CPU. first: further waits of a run's first
    update."""
    expected = first_step(config, "cpu", folder, Pretence())
    with pretending() as gpu:
        found = first_step(config, GPU, folder, gpu)
    found.show(config.task.kind)
    assert found.num_batches > 1, "what happens once a micro-batch would look like once a step"
    assert found.passes.to_gpu == found.num_batches, "a micro-batch goes to the GPU in one copy"
    assert not found.passes.own_waits, [str(wait) for wait in found.passes.waits]
    assert set(found.passes.other_waits) <= VMAP, [str(wait) for wait in found.passes.waits]
    assert found.update.own_waits == {UPDATE: 1, **(first or {})}, [str(wait) for wait in found.update.waits]
    assert set(found.compared.own_waits) <= {REFERENCE}, [str(wait) for wait in found.compared.waits]
    assert found.compared.own_waits.get(REFERENCE, 0) <= 1, "more than once for one block of the reference pass"
    assert found.numbers["loss"] == pytest.approx(expected.numbers["loss"], rel=rel)
    assert found.numbers["grad_norm"] == pytest.approx(expected.numbers["grad_norm"], rel=10 * rel)
    return found


@pytest.mark.parametrize("name", [pytest.param(name, marks=pytest.mark.slow if name in LESS_OFTEN else ()) for name in LANGUAGE])
def test_a_step_of_a_language_model(name: str, config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    step = check(config_of(*LANGUAGE[name]), tmp_path, rel=2e-2 if name == "bfloat16" else 1e-4)
    assert step.passes.kernels or name == "msl", "the head did not run its kernels"  # a few words need none


@pytest.mark.parametrize(("kind", "sampled"), SEQUENTIAL)
def test_a_step_of_a_recommender(kind: str, sampled: int, config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    dropout = "task.sequential.dropout=0.0"
    shape = (f"task.sequential.model={kind}", f"task.sequential.num_sampled={sampled}", "task.sequential.max_length=8", dropout)
    config = config_of("task.kind=sequential", "adapter.kind=none", *shape, "train.max_tokens_per_micro_batch=16")
    check(config, tmp_path)


def test_a_step_of_p2rec(config_of: Callable[..., RunConfig], tiny_data: Path, tmp_path: Path) -> None:
    write_p2rec_teacher(tmp_path / "teacher" / "model", PreparedData.open(tiny_data))
    changes = ("task.kind=p2rec_reconstruct", f"task.p2rec.num_categories={NUM_CATEGORIES}")
    config = config_of(*changes, f"task.p2rec.teacher={tmp_path / 'teacher'}", "train.max_tokens_per_micro_batch=120")
    check(config, tmp_path, first={"rec_dist/methods/p2rec/reconstruct.py:end_step": 1})  # ranks compare their categories


@pytest.mark.parametrize("sampled", [0, 16])
def test_a_step_of_retrieval(sampled: int, config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    shape = ("task.retrieval.width=16", f"task.retrieval.num_sampled={sampled}", "train.max_tokens_per_micro_batch=60")
    check(config_of("task.kind=retrieval", *shape), tmp_path)


def test_evaluation(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = config_of("evaluate.max_users=4", "evaluate.num_candidates=5")
    initial, data = find_initial_weights(config), open_data(config.data)
    examples = eval_examples_of(config, data)
    builder = ranking.build_checked_builder(config, ranking.EvaluateJob(config.model_dump(), str(tmp_path), initial, None), data)
    prompts = ranking.EvalPrompts(builder, examples, MAX_TOKENS, None)

    def scores_on(device: str) -> Any:
        module = Scorer(assemble.build_model(model_spec(config, initial, builder, device, trains=False)), ranking.no_loss, ())
        engine = PlainEngine(module.requires_grad_(True), device)
        engine.train_mode(False)
        score = lambda batch: engine.score(batch)[2].float().cpu()
        return ranking.table_of(
            prompts, ranking.score_prompts(score, prompts, World(device=device), MAX_TOKENS, lambda done: None)
        )

    expected = scores_on("cpu")
    with pretending():
        found = scores_on(GPU)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)
    assert found.shape == (4, 5) and np.isfinite(found).all()


def test_embedding(config_of: Callable[..., RunConfig], tmp_path: Path) -> None:
    config = config_of()
    job = embedding.EmbedJob(config.model_dump(), str(tmp_path), find_initial_weights(config), None)
    expected = embedding.Embedder(job, "cpu")._embed(range(3))
    with pretending() as gpu:
        embedder = embedding.Embedder(job, GPU)
        gpu.take()
        found = embedder._embed(range(3))
        happened = gpu.take()
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert happened.to_gpu == 1
    assert happened.own_waits == {"rec_dist/methods/language_model/embedding.py:_embed": 1}


# --- does the pretence find what it is there for


def planted(code: str) -> Callable[..., Any]:
    """A function `planted` that seems to be in a file of ours."""
    names: dict[str, Any] = {"torch": torch}
    exec(compile(code, f"{ROOT}/rec_dist/planted.py", "exec"), names)
    found: Callable[..., Any] = names["planted"]
    return found


PLANTED_WAITS = {
    "a number": "def planted(sums): float(sums[0])",
    "a list": "def planted(sums): sums.tolist()",
    "a condition": "def planted(sums):\n if sums[0] > 0: pass",
    "a copy": "def planted(sums): sums.cpu()",
    "values": "def planted(sums): sums + torch.tensor([1.0], device=sums.device)",
    "a mask": "def planted(sums): sums[sums > 0]",
    "an index": "def planted(sums): sums[[0]]",
    "sizes": "def planted(sums): torch.unique(sums)",
    "repeats": "def planted(sums): sums.repeat_interleave(torch.ones_like(sums).long())",
}


@pytest.mark.parametrize("name", PLANTED_WAITS)
def test_a_planted_wait_is_found(name: str) -> None:
    with pretending() as gpu:
        planted(PLANTED_WAITS[name])(torch.ones(3, device=GPU))
    assert gpu.own_waits == {"rec_dist/planted.py:planted": 1}, gpu.waits


def test_a_planted_wait_breaks_the_budget(
    config_of: Callable[..., RunConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    forward, wait = PlainEngine.forward, planted("def planted(loss):\n if loss.isnan(): raise ValueError")

    def checked(engine: PlainEngine, batch: Any) -> Any:
        result = forward(engine, batch)
        wait(result[0])
        return result

    monkeypatch.setattr(PlainEngine, "forward", checked)
    with pytest.raises(AssertionError, match=r"rec_dist/planted\.py"):
        check(config_of("task.kind=sft"), tmp_path)


PLANTED_MIXTURES = {
    "operands": "def planted(gpu): gpu + torch.ones(3)",
    "a lookup": "def planted(gpu): torch.nn.functional.embedding(torch.zeros(2, dtype=torch.long), gpu[:, None])",
    "a list": "def planted(gpu): torch.cat([gpu, torch.ones(1)])",
    "a number of the GPU": "def planted(gpu): torch.ones(3) * gpu[0]",
    "numpy": "def planted(gpu): gpu.numpy()",
}


@pytest.mark.parametrize("name", PLANTED_MIXTURES)
def test_a_planted_mixture_is_found(name: str) -> None:
    with pretending(), pytest.raises((MixedDevicesError, TypeError), match=r"rec_dist/planted\.py"):
        planted(PLANTED_MIXTURES[name])(torch.ones(3, device=GPU))


def test_a_mixture_in_a_backward_pass_is_found() -> None:
    class Faulty(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, values: torch.Tensor) -> torch.Tensor:
            return values.clone()

        @staticmethod
        def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
            return gradient * torch.ones(3)

    with pretending(), pytest.raises(MixedDevicesError):
        Faulty.apply(torch.ones(3, device=GPU, requires_grad=True)).sum().backward()


def test_a_kernel_takes_no_tensor_of_the_host() -> None:
    from rec_dist_kernels import preference_loss

    logps = torch.linspace(-3, -1, 4)
    with pretending(), pytest.raises(MixedDevicesError, match="kernel"):
        preference_loss(logps, logps, torch.tensor([0, 4]), kind="sdpo", beta=1.0, impl="triton")
