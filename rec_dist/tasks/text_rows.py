"""A language model trained on preference rows: prompts and completions are texts of the data set, and K is what each row has.

As LanguageTask but for where trunks come from: no users, no catalogue, no negatives to draw.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rec_dist.data.prompts.text_trunks import TextRows
from rec_dist.data.sampling.plan import Order
from rec_dist.models.assemble import ModelSpec
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import write_json
from rec_dist.stream.grouped import GroupedStream, pack_trunks, stand_in
from rec_dist.stream.trunk import I64, Trunk
from rec_dist.tasks.language import LanguageTask
from rec_dist.tasks.method import Method
from rec_dist.tasks.saved import save_weights

FORMAT_NAME = "completions.json"  # beside the saved model: what ends a completion


class TextRowsTask(LanguageTask):
    """Implements tasks.task.Task. A unit is one row: a trunk with one group."""

    def __init__(
        self,
        method: Method,
        model: ModelSpec,
        rows: TextRows,
        end: Sequence[int],
        *,
        order: Order,
        reference_key: str,
        width: int,
    ) -> None:
        self._take_method(method, model, order=order, reference_key=reference_key, width=width)
        self._rows, self._end = rows, list(end)

    def draw_epoch(self, epoch: int) -> int:
        """Nothing is drawn: every epoch has the same rows."""
        return 0

    def unit(self, index: int, epoch: int) -> Trunk:
        """The trunk of row `index`."""
        return self._rows.trunk(index)

    def units(self, indices: I64, epochs: I64) -> list[Trunk]:
        """unit() of each."""
        return [self._rows.trunk(index) for index in indices.tolist()]

    def users(self, indices: I64) -> list[str]:
        """The rows' numbers: they have no users."""
        return [f"row {index}" for index in sorted(set(indices.tolist()))]

    def collate(self, units: Sequence[Any], *, step: int) -> GroupedStream:
        """One pack, the same at any step; the stand-in for none."""
        return pack_trunks(list(units)) if units else stand_in(min(self._method.num_negatives, 1))

    def check(self, tokens_per_pack: int, *, max_positions: int | None) -> None:
        """Raises UserError for a pack smaller than the longest row, or a row longer than the model's positions."""
        trunks = [self._rows.trunk(row) for row in range(len(self._rows))]
        lengths = [trunk.num_tokens for trunk in trunks]
        row = max(range(len(lengths)), key=lengths.__getitem__)
        if lengths[row] > tokens_per_pack:
            raise UserError(
                f"train.tokens_per_pack ({tokens_per_pack}) is smaller than the longest preference row ({lengths[row]} tokens, row "
                f"{row}); raise it or leave long rows out"
            )
        positions = [len(trunk.tokens) + int(trunk.lengths.max()) - 1 for trunk in trunks]
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
