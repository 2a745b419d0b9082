"""Preference rows as a task: prompts and completions are texts of the data set, and each row brings its own K rejected ones.

The model part is that of interactions (`language_model`); there are no users, no catalogue and no negatives to draw.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rec_dist.data.prompts.text_prompts import TextRows
from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.errors import UserError
from rec_dist.methods.language_model.limits import check_positions
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.saved_model import save_weights
from rec_dist.methods.language_model.task import language_model
from rec_dist.methods.task import Reference, Task
from rec_dist.models.assemble import ModelSpec
from rec_dist.packing.grouped_prompt import GroupedPrompt
from rec_dist.packing.packed_batch import PackedBatch, dummy_batch, pack_prompts
from rec_dist.packing.sizes import OneByOne
from rec_dist.runtime.arrays import I64
from rec_dist.storage.files import write_json

FORMAT_NAME = "completions.json"  # beside the saved model: what ends a completion


@dataclass(frozen=True)
class PreferenceRowExamples:
    """Implements methods.task.TaskData. An example is one row: a prompt with one group.

    compares: whether rows have rejected completions.
    """

    rows: TextRows
    compares: bool

    def example(self, index: int) -> GroupedPrompt:
        """Build the prompt of row `index`."""
        return self.rows.grouped_prompt(index)

    def draw(self, indices: I64, epochs: I64) -> OneByOne:
        """Nothing is drawn; every epoch has the same rows."""
        return OneByOne(self.rows.sizes(indices), lambda place: self.example(int(indices[place])))

    def collate(self, examples: Sequence[Any], *, step: int) -> PackedBatch:
        """Pack one micro-batch, the same at any step; without examples, the dummy batch."""
        return pack_prompts(list(examples)) if examples else dummy_batch(int(self.compares))

    def users(self, indices: I64) -> list[int]:
        """Return the numbers of the rows, since rows have no users."""
        return sorted(set(indices.tolist()))

    def check(self, *, max_tokens: int, max_positions: int | None) -> None:
        """Raises UserError for a micro-batch smaller than the longest row, or a row longer than the model's positions."""
        prompts = [self.rows.grouped_prompt(row) for row in range(len(self.rows))]
        lengths = [prompt.num_tokens for prompt in prompts]
        row = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[row] > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the longest preference row "
                f"({lengths[row]} tokens, row {row}); raise it or leave long rows out"
            )
        positions = [len(prompt.tokens) + int(prompt.lengths.max()) - 1 for prompt in prompts]
        row = max(range(len(positions)), key=positions.__getitem__)
        check_positions(positions[row], max_positions, what=f"data.path: row {row}", way_out="leave it out")


def preference_rows_task(
    objective: Objective,
    model: ModelSpec,
    examples: PreferenceRowExamples,
    end: Sequence[int],
    *,
    sampler: GlobalBatchSampler,
    reference_key: str,
    width: int,
) -> Task:
    """Train `model` (of `width`) with `objective` on preference rows. Call examples.check() first.

    end: the tokens that end a completion, saved beside the model.
    """

    def save(weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        save_weights(weights, module, model, folder)
        write_json(folder / FORMAT_NAME, {"end": list(end)})

    return Task(
        name=objective.name,
        sampler=sampler,
        data=examples,
        model=language_model(objective, model, width=width),
        save=save,
        reference=Reference(reference_key) if objective.needs_reference else None,
    )
