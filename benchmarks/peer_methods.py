"""One step of S-DPO training, forward and backward, as peers do it and as we do: the same model, tokens, adapter and loss.

a: S-DPO as published (arXiv 2406.09215, section 4): every completion follows its own copy of the prompt; padded sequences with a
   mask; logits of all positions in float32; the reference is scored in the same step with the adapter off.
b: the strongest replicated form: no padding, no position that nothing reads, the head on completion rows only, cached reference.
d: ours, each prompt shared by its completions.
e: ours, 10 targets of one user in one grouped prompt.

G groups, N = K + 1 completions of a group, P prompt tokens, C completion tokens, L = P + C.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from benchmarks.peer_targets import MAX_TOKENS, Point
from rec_dist.losses import preference_sums
from rec_dist.methods.preference import sdpo
from rec_dist.models.attention_paths import choose_attention
from rec_dist.models.fused_lora import fuse_lora
from rec_dist.models.per_prompt import register
from rec_dist.models.scorer import Scorer
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, pack_prompts
from rec_dist_kernels import completion_logps

BETA, END, TIMELINE = 1.0, 0, 10


@dataclass(frozen=True)
class Shape:
    """The shape of a random Llama; the default is that of SmolLM2-135M."""

    hidden: int = 576
    layers: int = 30
    heads: int = 9
    kv_heads: int = 3
    intermediate: int = 1536
    vocab: int = 49152
    tied: bool = True

    @property
    def num_weights(self) -> int:
        """The number of elements of all weights."""
        attention = 2 * self.hidden * self.hidden * (1 + self.kv_heads / self.heads)
        layer = attention + 3 * self.hidden * self.intermediate + 2 * self.hidden
        return int(self.layers * layer + ((1 if self.tied else 2) * self.vocab + 1) * self.hidden)


TINY = Shape(hidden=32, layers=2, heads=4, kv_heads=2, intermediate=64, vocab=320)


def llama_config(shape: Shape) -> Any:
    """The configuration that transformers builds a Llama of this shape from."""
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.kv_heads,
        max_position_embeddings=32768,
        tie_word_embeddings=shape.tied,
        bos_token_id=None,
        eos_token_id=END,
    )


def build_model(
    shape: Shape, *, lora: bool = True, dtype: torch.dtype = torch.float32, device: str = "cpu", attention: str = "sdpa"
) -> nn.Module:
    """Random weights, equal in every process. LoRA r8 on all linear layers; its B is not zero, so the adapter has an effect.

    attention: as model.attention; a, b and c need none of our masks and use transformers' default, "sdpa".
    """
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaForCausalLM

    config = llama_config(shape)
    register()
    config._attn_implementation = choose_attention(attention, config, device=device)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        with torch.device(device):
            model: nn.Module = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    if not lora:
        return model
    settings = LoraConfig(r=8, lora_alpha=16, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(model, settings, autocast_adapter_dtype=False)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
    return model


@dataclass(frozen=True)
class Case:
    """The tokens of a step: prompts (G, P), completions (G, N, C). The chosen one comes first; END is the last token of each."""

    prompts: Tensor
    completions: Tensor


def make_case(point: Point, vocab: int) -> Case:
    """Random tokens, the same in every process."""
    generator = torch.Generator().manual_seed(point.prompt * 1000 + point.negatives)
    draw = lambda *size: torch.randint(1, vocab, size, generator=generator)
    completions = draw(point.groups, point.negatives + 1, point.completion)
    completions[:, :, -1] = END
    return Case(draw(point.groups, point.prompt), completions)


def timeline(point: Point, vocab: int) -> list[tuple[Tensor, Tensor]]:
    """TIMELINE targets of one user: (prompt (P + i C,), completions (N, C)). Each prompt is a prefix of the next."""
    case = make_case(Point(point.prompt, point.completion, point.negatives, TIMELINE), vocab)
    prompt, out = case.prompts[0], []
    for completions in case.completions:
        out.append((prompt, completions))
        # The chosen title continues the history; one token follows, where the next answer begins.
        prompt = torch.cat([prompt, completions[0, :-1], case.prompts[1, :1]])
    return out


def prompt_of(prompt: Tensor, branch_points: list[int], completions: list[Tensor], key: int) -> GroupedPrompt:
    """Builds a grouped prompt from prompt (P,) and a branch point and completions (N, C) for each group.

    A chosen completion that the prompt itself continues with takes no rows.
    """
    inputs, sizes = [], [len(group) for group in completions]
    for branch_point, group in zip(branch_points, completions, strict=True):
        for place, answer in enumerate(group):
            stands = place == 0 and torch.equal(prompt[branch_point + 1 : branch_point + len(answer)], answer[:-1])
            inputs.append(answer[:0] if stands else answer[:-1])
    answers = [answer for group in completions for answer in group]
    array = lambda values: np.asarray(values, dtype=np.int32)
    return GroupedPrompt(
        tokens=array(prompt),
        branch_points=array(branch_points),
        keys=np.arange(key, key + len(branch_points), dtype=np.int64),
        group_sizes=array(sizes),
        completion_inputs=array(torch.cat(inputs)),
        input_lengths=array([len(row) for row in inputs]),
        lengths=array([len(answer) for answer in answers]),
        targets=array(torch.cat(answers)),
    )


def mean_loss(logps: Tensor, reference: Tensor, groups: int) -> Tensor:
    """The S-DPO loss over groups of equal size: logps, reference (G * N,) -> ()."""
    offsets = torch.arange(0, len(logps) + 1, len(logps) // groups, device=logps.device)
    return preference_sums(logps, reference, offsets, kind="sdpo", beta=BETA).loss_sum / groups


def in_micro_batches(case: Case, micro_batch: int) -> list[Case]:
    """Splits `case` into micro-batches to limit memory.

    Each has as many whole groups, written out, as fit into `micro_batch` tokens, but at least one.
    """
    size, width = case.completions.shape[1:]
    held = max(1, micro_batch // (size * (case.prompts.shape[1] + width)))
    return [Case(*parts) for parts in zip(case.prompts.split(held), case.completions.split(held), strict=True)]


def written_out(case: Case) -> Tensor:
    """(G * N, P + C): every completion after its own copy of the prompt."""
    prompts = case.prompts[:, None].expand(-1, case.completions.shape[1], -1)
    return torch.cat([prompts, case.completions], dim=2).flatten(0, 1)


class Separate:
    """What a and b share: a forward and a backward pass for each micro-batch.

    logps(micro_batch) -> (G * N,) log-probs of the sequences of that micro-batch.
    """

    def __init__(self, micro_batches: list[Case]) -> None:
        self.sizes = [len(micro_batch.prompts) for micro_batch in micro_batches]

    @property
    def groups(self) -> int:
        return sum(self.sizes)

    def logps(self, micro_batch: int) -> Tensor:
        raise NotImplementedError

    def reference(self, micro_batch: int) -> Tensor:
        raise NotImplementedError

    def step(self) -> float:
        total = 0.0
        for micro_batch, size in enumerate(self.sizes):
            reference = self.reference(micro_batch)
            loss = mean_loss(self.logps(micro_batch), reference, size) * size / self.groups
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
        return total


class Published(Separate):
    """a: one forward pass of policy and one of reference over G * N whole sequences, with all logits."""

    def __init__(self, model: Any, micro_batches: list[Case]) -> None:
        super().__init__(micro_batches)
        self.model = model
        self.ids = [written_out(micro_batch) for micro_batch in micro_batches]  # (G * N, L) each
        self.masks = [torch.ones_like(ids) for ids in self.ids]
        self.scored = [torch.zeros_like(ids, dtype=torch.bool) for ids in self.ids]
        for scored, micro_batch in zip(self.scored, micro_batches, strict=True):
            scored[:, -micro_batch.completions.shape[2] :] = True

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)

    def logps(self, micro_batch: int) -> Tensor:
        ids = self.ids[micro_batch]
        logits = self.model(
            input_ids=ids, attention_mask=self.masks[micro_batch], use_cache=False
        ).logits.float()  # (G * N, L, V)
        every = F.log_softmax(logits[:, :-1], dim=-1).gather(2, ids[:, 1:, None])[..., 0]
        return (every * self.scored[micro_batch][:, 1:]).sum(1)

    def reference(self, micro_batch: int) -> Tensor:
        with torch.no_grad(), self.model.disable_adapter():
            return self.logps(micro_batch)


class Replicated(Separate):
    """b: all lengths are equal, so there is no padding. The last token is not fed; the head sees completion rows only."""

    def __init__(self, model: Any, micro_batches: list[Case], *, adapter: bool = True) -> None:
        super().__init__(micro_batches)
        self.base = model.get_base_model() if adapter else model
        self.ids = [written_out(micro_batch)[:, :-1].contiguous() for micro_batch in micro_batches]  # (G * N, L - 1) each
        self.scored = []
        for ids, micro_batch in zip(self.ids, micro_batches, strict=True):
            width, device = micro_batch.completions.shape[2], ids.device
            starts = torch.arange(len(ids), device=device)[:, None] * ids.shape[1] + micro_batch.prompts.shape[1] - 1
            rows = (starts + torch.arange(width, device=device)).flatten()  # (G * N * C,)
            offsets = torch.arange(0, len(rows) + 1, width, device=device)
            self.scored.append((rows, micro_batch.completions.flatten(), offsets))
        self.references = [torch.zeros(len(ids), device=ids.device) for ids in self.ids]
        if adapter:
            with torch.no_grad(), model.disable_adapter():
                self.references = [self.logps(micro_batch) for micro_batch in range(len(micro_batches))]

    @property
    def num_tokens(self) -> int:
        return sum(ids.numel() for ids in self.ids)

    def logps(self, micro_batch: int) -> Tensor:
        hidden = self.base.base_model(input_ids=self.ids[micro_batch], use_cache=False).last_hidden_state.flatten(0, 1)
        return completion_logps(hidden, self.base.get_output_embeddings().weight, *self.scored[micro_batch])

    def reference(self, micro_batch: int) -> Tensor:
        return self.references[micro_batch]


class Grouped:
    """d and e: our scorer, loss and LoRA on packed batches with a cached reference.

    Each of `micro_batches` takes a forward and a backward pass.
    """

    def __init__(
        self,
        model: Any,
        micro_batches: list[list[GroupedPrompt]],
        negatives: int,
        *,
        adapter: bool = True,
        device: str = "cpu",
    ) -> None:
        method = sdpo(beta=BETA, num_negatives=negatives)
        fuse_lora(model)
        self.scorer = Scorer(model, method.loss, method.metric_names, method.preference)
        self.batches: list[PackedBatch] = [pack_prompts(prompts).to(device) for prompts in micro_batches]
        if adapter:
            with torch.no_grad(), self.scorer.as_reference():
                self.batches = [batch.with_reference(self.scorer(batch)[2]) for batch in self.batches]

    @property
    def groups(self) -> int:
        return sum(batch.num_groups for batch in self.batches)

    @property
    def num_tokens(self) -> int:
        return sum(batch.num_tokens for batch in self.batches)

    def step(self) -> float:
        total, groups = 0.0, self.groups
        for batch in self.batches:
            loss_sum, sums, _ = self.scorer(batch)
            (loss_sum / groups).backward()
            total += float(sums[0])
        return total / groups


def build(method: str, model: Any, point: Point, vocab: int) -> Any:
    """Builds method "a", "b", "d", "e" or "e-apart".

    "e-apart" has e's targets, each with a prompt of its own; e must have the same loss.
    """
    case = make_case(point, vocab)
    if method == "a":
        return Published(model, in_micro_batches(case, MAX_TOKENS))
    if method == "b":
        return Replicated(model, in_micro_batches(case, MAX_TOKENS))
    if method == "d":
        pairs = zip(case.prompts, case.completions, strict=True)
        prompts = [prompt_of(prompt, [len(prompt) - 1], [answers], key) for key, (prompt, answers) in enumerate(pairs)]
        return Grouped(model, [prompts], point.negatives)
    targets = timeline(point, vocab)
    if method == "e":
        branch_points = [len(prompt) - 1 for prompt, _ in targets]
        return Grouped(
            model, [[prompt_of(targets[-1][0], branch_points, [answers for _, answers in targets], 0)]], point.negatives
        )
    assert method == "e-apart", method
    prompts = [prompt_of(prompt, [len(prompt) - 1], [answers], key) for key, (prompt, answers) in enumerate(targets)]
    return Grouped(model, [[grouped] for grouped in prompts], point.negatives)  # ten prompts in one batch would not fit
