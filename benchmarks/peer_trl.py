"""c: TRL's DPOTrainer on the same pairs (K = 1), by default and at its best on this machine. Needs the extra `peers`.

Its loss is checked against ours. default: DPOConfig's defaults except for float32 on the CPU; they recompute activations and
score the reference in the same step. best: no recomputation, and precomputed reference log-probs. liger: that with Liger's layers
and without padding; the layers are Triton kernels, which need a GPU. TRL itself has switched padding_free off since its refactor,
and use_logits_to_keep no longer exists: its head is fused and reads completion positions only.
"""

import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from benchmarks.peer_methods import BETA, END, make_case
from benchmarks.peer_targets import Point

VARIANTS: dict[str, dict[str, Any]] = {
    "c-default": {},
    "c-best": {"gradient_checkpointing": False, "precompute_ref_log_probs": True},
    "c-liger": {
        "gradient_checkpointing": False,
        "precompute_ref_log_probs": True,
        "use_liger_kernel": True,
        "padding_free": True,
    },
}


class TRLMethod:
    """A DPOTrainer. We call its training_step on one fixed batch."""

    def __init__(self, model: Any, point: Point, vocab: int, variant: str) -> None:
        os.environ.setdefault("HF_DATASETS_OFFLINE", "1")
        os.environ.setdefault("TQDM_DISABLE", "1")
        self.folder = tempfile.TemporaryDirectory()
        os.environ.setdefault("HF_DATASETS_CACHE", self.folder.name)
        from datasets import Dataset, disable_progress_bars
        from transformers.integrations.liger import apply_liger_kernel
        from trl import DPOConfig, DPOTrainer

        disable_progress_bars()
        case = make_case(point, vocab)
        rows = [
            {"prompt_ids": prompt.tolist(), "chosen_ids": answers[0].tolist(), "rejected_ids": answers[1].tolist()}
            for prompt, answers in zip(case.prompts, case.completions, strict=True)
        ]

        class Pretokenised(DPOTrainer):  # type: ignore[misc]
            """Takes the same tokens as the other methods and tokenises nothing."""

            def _prepare_dataset(self, dataset: Any, *rest: Any, **more: Any) -> Any:
                return dataset

        wanted = {
            "output_dir": self.folder.name,
            "per_device_train_batch_size": point.groups,
            "beta": BETA,
            "max_length": None,
            "use_cpu": True,
            "bf16": False,
            "report_to": "none",
            "disable_tqdm": True,
            **VARIANTS[variant],
        }
        config = DPOConfig(**{name: value for name, value in wanted.items() if name in inspect.signature(DPOConfig).parameters})
        data = Dataset.from_list(rows)
        # TRL's reference is a copy of the adapter that it gets; ours is the adapter switched off. They agree if the adapter has
        # no effect at that moment.
        with _without_effect(model):
            self.trainer = Pretokenised(model=model, args=config, train_dataset=data, processing_class=_tokenizer(vocab))
        if self.trainer.args.use_liger_kernel:  # train() does this, and we only call training_step
            apply_liger_kernel(self.trainer.model, self.trainer.args.liger_kernel_config)
        self.trainer.current_gradient_accumulation_steps = 1
        examples = [self.trainer.train_dataset[index] for index in range(point.groups)]
        self.batch = self.trainer.data_collator(examples)
        self.num_tokens = int(self.batch["input_ids"].numel())
        self.groups = point.groups

    def step(self) -> float:
        batch = {name: value.clone() if isinstance(value, torch.Tensor) else value for name, value in self.batch.items()}
        return float(self.trainer.training_step(self.trainer.model, batch))


@contextmanager
def _without_effect(model: torch.nn.Module) -> Iterator[None]:
    """Sets the B of every LoRA layer to zero inside the block."""
    moved = {parameter: parameter.detach().clone() for name, parameter in model.named_parameters() if "lora_B" in name}
    with torch.no_grad():
        for parameter in moved:
            parameter.zero_()
        yield
        for parameter, value in moved.items():
            parameter.copy_(value)


def _tokenizer(vocab: int) -> Any:
    """A tokenizer with one word a token. TRL demands one although nothing is left to tokenise."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"<eos>": END, **{f"t{token}": token for token in range(1, vocab)}}
    inner = Tokenizer(models.WordLevel(words, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
