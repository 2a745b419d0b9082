"""Runs a causal language model that the caller has loaded, and gives it back exactly as it was, also after an error.

Inside, dropout is off and attention takes the masks of packed batches. Both are switches that transformers reads at each forward
pass: the modules' training flags and the configurations' attention implementation. Nothing is replaced, wrapped or hooked.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn

from rec_dist.errors import UserError
from rec_dist.models.attention import why_unsupported
from rec_dist.models.attention_paths import base_of, choose_attention, run_decoder
from rec_dist.models.flex import COMPILATIONS, FLEX
from rec_dist.models.per_prompt import register
from rec_dist.packing.packed_batch import PackedBatch
from rec_dist_kernels import completion_logps

_LOGIT_BYTES = 64 << 20  # float32 logits at a time, where the head is no plain linear layer
_WAY_OUT = "choose a decoder such as Llama, Qwen, Gemma or GPT-2"


def check_borrowed(model: Any) -> None:
    """Raises UserError if `model` is no causal language model of transformers, or one whose prompts cannot be shared."""
    base: Any = base_of(model) if isinstance(model, nn.Module) else model
    kind = type(base).__name__
    if not (isinstance(base, nn.Module) and hasattr(base, "get_output_embeddings") and hasattr(base, "config")):
        raise UserError(f"model is a {kind}; give a causal language model of transformers, with or without a PEFT adapter")
    fault, config = why_unsupported(base), cast(Any, base.config)
    if fault is None and config.get_text_config(decoder=True) is not config:
        fault = "reads more than text"
    if fault is None and (wrapped := _why_not_peft(model)):
        raise UserError(f"model has {wrapped}; merge it into the model, or score with a LoRA adapter")
    if all(weight.is_meta for weight in model.parameters()) and not any(hasattr(part, "_hf_hook") for part in model.modules()):
        raise UserError(f"model is a {kind} on the meta device, which holds no weights; load it with from_pretrained")
    if fault:
        raise UserError(f"model is a {kind}, which {fault}; {_WAY_OUT}")


def _why_not_peft(model: Any) -> str | None:
    """A kind of PEFT that works outside the base model's own modules, which a packed batch would skip."""
    if not hasattr(model, "get_base_model"):
        return None
    from peft.tuners.tuners_utils import BaseTuner

    config = model.active_peft_config
    if config.is_prompt_learning or not isinstance(model.base_model, BaseTuner) or config.peft_type == "XLORA":
        return f"an adapter of kind {getattr(config.peft_type, 'value', config.peft_type)}, which changes its input or attention"
    if getattr(config, "alora_invocation_tokens", None):
        return "an activated LoRA, which switches on in the middle of a sequence"
    return None


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Inside, every module is in evaluation mode and no graph is recorded. Afterwards each module has its own mode again."""
    modes = [(module, module.training) for module in model.modules()]
    # Block masks cannot be made under inference_mode, and autocast would give masks and queries different dtypes.
    with torch.inference_mode(False), torch.no_grad(), torch.autocast(input_device(model).type, enabled=False):
        try:
            for module, _ in modes:
                module.training = False
            yield
        finally:
            for module, mode in modes:
                module.training = mode


@contextmanager
def taking_packed_batches(model: nn.Module, attention: str) -> Iterator[None]:
    """Inside, the model's attention takes the masks of packed batches. attention: as in attention_paths.choose_attention."""
    base = base_of(model)
    chosen = _attention(base, attention)
    configs = {id(module.config): module.config for module in base.modules() if hasattr(module, "config")}
    before = [(config, config._attn_implementation_internal) for config in configs.values()]
    register()
    try:
        for config, _ in before:
            config._attn_implementation_internal = chosen
        if chosen == FLEX:
            import torch._dynamo.config as dynamo

            with dynamo.patch(recompile_limit=max(int(dynamo.recompile_limit), COMPILATIONS)):
                yield
        else:
            yield
    finally:
        for config, implementation in before:
            config._attn_implementation_internal = implementation


def _attention(base: Any, wanted: str) -> str:
    """The implementation to switch to; the model's own if it cannot switch and its own takes a dense mask."""
    spread = len(set((getattr(base, "hf_device_map", None) or {}).values())) > 1
    if spread and wanted == "auto":  # accelerate moves tensors between devices, and a dense mask is one
        wanted = "sdpa"
    chosen = choose_attention(wanted, base.config, device=input_device(base).type)
    own: str = base.config._attn_implementation
    if chosen == own or base._can_set_attn_implementation():
        return chosen
    if own in ("sdpa", "eager"):
        return own
    raise UserError(f'model runs with attn_implementation="{own}" and cannot switch; load it with attn_implementation="sdpa"')


def packed_logps(model: nn.Module, batch: PackedBatch) -> Tensor:
    """(N,) float32 on the CPU: summed log-probs of the batch's completions. Call inside both contexts of this module."""
    base = base_of(model)
    hidden = run_decoder(base, batch.to(str(input_device(base))))  # (>= T, D)
    head, softcap = base.get_output_embeddings(), getattr(base.config, "final_logit_softcapping", None)
    batch = batch.to(str(hidden.device))
    hooked = getattr(head, "_hf_hook", None) is not None or head._forward_hooks or head._forward_pre_hooks
    if type(head) is nn.Linear and head.weight.dtype == hidden.dtype and not hooked:
        arrays = (batch.rows, batch.targets, batch.completion_offsets)
        return completion_logps(hidden, head.weight, *arrays, bias=head.bias, softcap=softcap, plan=batch.plan).float().cpu()
    size = max(1, _LOGIT_BYTES // (4 * base.get_input_embeddings().weight.shape[0]))
    scored = [_token_logps(head(hidden[rows]), targets, softcap) for rows, targets in _chunks(batch, size)]
    sums = torch.zeros(len(batch.completion_offsets) - 1, device=hidden.device)
    numbers, lengths = torch.arange(len(sums), device=hidden.device), batch.completion_offsets.diff()
    owners = torch.repeat_interleave(numbers, lengths, output_size=len(batch.rows))
    return sums.index_add_(0, owners, torch.cat(scored).to(hidden.device)).cpu()


def _chunks(batch: PackedBatch, size: int) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(torch.split(batch.rows, size), torch.split(batch.targets, size), strict=True)


def _token_logps(logits: Tensor, targets: Tensor, softcap: float | None) -> Tensor:
    """logits (m, V), targets (m,) -> (m,) float32."""
    logits = logits.float()
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return torch.log_softmax(logits, -1).gather(1, targets.to(logits.device)[:, None])[:, 0]


def input_device(model: nn.Module) -> torch.device:
    """Where the model takes its inputs. accelerate keeps offloaded weights as meta tensors and takes inputs from anywhere."""
    device: torch.device = next(model.parameters()).device
    return torch.device("cpu") if device.type == "meta" else device
