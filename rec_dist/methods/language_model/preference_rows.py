"""A language model trained on preference rows: prompts and completions are texts of the data set, and K is what each row has.

As LanguageTask but for where prompts come from: no users, no catalogue, no negatives to draw.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rec_dist.data.prompts.text_prompts import TextRows
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.errors import UserError
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.saved_model import save_weights
from rec_dist.methods.language_model.task import LanguageTask
from rec_dist.models.assemble import ModelSpec
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.runtime.arrays import I64
from rec_dist.storage.files import write_json

FORMAT_NAME = "completions.json"  # beside the saved model: what ends a completion


class TextRowsTask(LanguageTask):
    """Implements tasks.task.Task. A example is one row: a prompt with one group."""

    def __init__(
        self,
        method: Objective,
        model: ModelSpec,
        rows: TextRows,
        end: Sequence[int],
        *,
        sampler: GlobalBatchSampler,
        reference_key: str,
        width: int,
    ) -> None:
        self._take_objective(method, model, sampler=sampler, reference_key=reference_key, width=width)
        self._rows, self._end = rows, list(end)

    def draw_epoch(self, epoch: int) -> int:
        """Nothing is drawn: every epoch has the same rows."""
        return 0

    def example(self, index: int, epoch: int) -> GroupedPrompt:
        """The prompt of row `index`."""
        return self._rows.grouped_prompt(index)

    def examples(self, indices: I64, epochs: I64) -> list[GroupedPrompt]:
        """unit() of each."""
        return [self._rows.grouped_prompt(index) for index in indices.tolist()]

    def users(self, indices: I64) -> list[str]:
        """The rows' numbers: they have no users."""
        return [f"row {index}" for index in sorted(set(indices.tolist()))]

    def collate(self, examples: Sequence[Any], *, step: int) -> PackedBatch:
        """One micro-batch, the same at any step; the dummy batch for none."""
        return pack_prompts(list(examples)) if examples else dummy_batch(min(self._objective.num_negatives, 1))

    def check(self, max_tokens: int, *, max_positions: int | None) -> None:
        """Raises UserError for a micro-batch smaller than the longest row, or a row longer than the model's positions."""
        prompts = [self._rows.grouped_prompt(row) for row in range(len(self._rows))]
        lengths = [prompt.num_tokens for prompt in prompts]
        row = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[row] > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest preference row ({lengths[row]} tokens, row "
                f"{row}); raise it or leave long rows out"
            )
        positions = [len(prompt.tokens) + int(prompt.lengths.max()) - 1 for prompt in prompts]
        row = max(range(len(positions)), key=positions.__getitem__)
        if max_positions is not None and positions[row] > max_positions:
            raise UserError(
                f"data.path: row {row} takes {positions[row]} positions and the model has {max_positions}; leave it out"
            )

    def notes(self) -> list[str]:
        """Nothing that the manifest does not say."""
        return []

    def save_model(self, weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        """As tasks.saved.save_weights, and what ends a completion."""
        save_weights(weights, module, self._model, folder)
        write_json(folder / FORMAT_NAME, {"end": self._end})
