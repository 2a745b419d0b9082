"""The vectors of the items: the model's state of each title, as a history of that item alone, whitened (methods/whitening.py).

Like cached reference log-probs, they are computed once as the run starts, by all ranks, and kept beside the run with a key of all
that they depend on. Only the catalogue and the token budget decide which items share a micro-batch, so the vectors are the same on
any number of workers, and a killed pass goes on with its next part. Cost: one pass over instruction and title of each item, and
4 W bytes an item on every rank.

I items, D width of the model, W width of the vectors.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rec_dist.data.artifacts.embeddings import PartFiles, sweep
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.methods.language_model.embedding import cut
from rec_dist.methods.retrieval.examples import TitlePrompts
from rec_dist.methods.retrieval.head import ItemTable
from rec_dist.methods.task import Passes, Score
from rec_dist.methods.whitening import whitened, whitening
from rec_dist.packing.pooled_prompts import PooledPrompts, pack_pooled_spans
from rec_dist.runtime import collectives
from rec_dist.runtime.arrays import F32, I64
from rec_dist.storage.checksums import damage, describe, read_manifest, write_manifest
from rec_dist.storage.files import atomic_path, fingerprint

FOLDER_NAME, TABLE_NAME, MANIFEST_NAME = "items", "items.safetensors", "items.json"  # beside the run
_FORMAT_VERSION = 1
_BATCHES_PER_PART = 8


@dataclass(frozen=True)
class ItemVectors:
    """The vectors of a catalogue. key: changes with data, model, prompt and dtype. width: W."""

    prepared: PreparedData
    prompts: TitlePrompts
    key: str
    width: int

    def compute(self, passes: Passes) -> ItemTable:
        """The table that the run directory holds, or a new one. A collective.

        Raises UserError on every rank if a state is not finite, or if there are fewer than W directions.
        """
        folder, main = passes.run_folder / FOLDER_NAME, passes.world.is_main
        if not collectives.share_from_main(main and self._is_current(folder)):
            parts = self._write_states(passes, folder)
            fault = None
            if main:
                try:
                    self._write_table(parts)
                except UserError as error:  # every rank must raise it, or the others would wait
                    fault = str(error)
            if (fault := collectives.share_from_main(fault)) is not None:
                raise UserError(fault)
        return ItemTable(**load_file(folder / TABLE_NAME), log_counts=log_counts(self.prepared))

    def refresh(self, passes: Passes, table: ItemTable) -> None:
        """Replace the vectors of `table` by those of the model as it is, whitened as before. A collective.

        A micro-batch runs whole on one rank, so the vectors are the same on any number of workers.
        """
        begins = cut(self.lengths(), passes.max_tokens).tolist()
        world, batches = passes.world, [range(first, stop) for first, stop in pairwise(begins)]
        mean, directions = (tensor.cpu().numpy().astype(np.float64) for tensor in (table.mean, table.whitening))
        own: list[F32] = []
        for first in range(0, len(batches), world.size):
            place = first + world.rank
            states = passes.score(self.batch(batches[min(place, len(batches) - 1)])).numpy()
            own += [whitened(states, mean, directions)] if place < len(batches) else []
            passes.report(first, len(batches))
        of_ranks = collectives.gather(own)
        in_order = [of_ranks[number % world.size][number // world.size] for number in range(len(batches))]
        table.vectors = torch.from_numpy(np.concatenate(in_order)).to(table.vectors.device)

    def lengths(self) -> I64:
        """(I,) tokens of each item's prompt."""
        builder = self.prompts.builder
        return builder.titles.lengths + len(builder.pieces.begin) + len(builder.pieces.item_prefix)

    def check(self, *, max_tokens: int) -> None:
        """Raises UserError for a title that is too long for a micro-batch."""
        lengths = self.lengths()
        if (longest := int(lengths.max())) > max_tokens:
            raise UserError(
                f"train.max_tokens_per_micro_batch ({max_tokens}) is smaller than the prompt of "
                f"{self.prepared.titles[int(lengths.argmax())][:60]!r} ({longest} tokens); raise it"
            )

    def batch(self, items: range) -> PooledPrompts:
        """The prompts of these items, with one state each."""
        single = [np.asarray([item], dtype=np.int32) for item in items]
        tokens = [self.prompts.tokens(item) for item in single]
        return pack_pooled_spans(tokens, np.arange(len(tokens)), np.concatenate([self.prompts.spans(item) for item in single]))

    def _write_states(self, passes: Passes, folder: Path) -> PartFiles:
        """Write the states as parts, a part a rank at a time. Every rank makes the same number of passes."""
        begins = cut(self.lengths(), passes.max_tokens)
        starts = [*begins[:-1:_BATCHES_PER_PART].tolist(), self.prepared.num_items]
        parts = PartFiles(folder, fingerprint([self.key, passes.max_tokens]), starts)  # the budget decides the items of a part
        missing = collectives.share_from_main([part for part in range(len(parts)) if not parts.is_current(part)])
        for first in range(0, len(missing), passes.world.size):
            now = missing[first : first + passes.world.size]
            own = now[passes.world.rank] if passes.world.rank < len(now) else None
            states = self._states(passes.score, [] if own is None else _micro_batches(begins, own))
            if own is not None:
                parts.write(own, states)
            passes.report(len(parts) - len(missing) + first + len(now), len(parts))
        collectives.barrier()
        return parts

    def _states(self, score: Score, micro_batches: Sequence[range]) -> F32:
        """(n, D) of the items of these micro-batches, in _BATCHES_PER_PART passes, of which the missing ones run one token."""
        found = [score(self.batch(items)).numpy() for items in micro_batches]
        for _ in range(_BATCHES_PER_PART - len(micro_batches)):
            score(pack_pooled_spans([np.zeros(1, dtype=np.int32)], np.zeros(1, dtype=np.int64), np.asarray([[0, 1]])))
        return np.concatenate(found) if found else np.empty((0, 0), dtype=np.float32)

    def _write_table(self, parts: PartFiles) -> None:
        """Whiten all parts into one file, then its manifest, which makes it valid, and remove the parts."""
        blocks = [parts.read(part) for part in range(len(parts))]
        for first, block in zip(parts.starts, blocks, strict=False):
            finite = np.isfinite(block).all(axis=1)
            if not finite.all():
                item = first + int(finite.argmin())
                raise UserError(
                    f"model.path: the state of {self.prepared.titles[item][:60]!r} (item {item}) is not finite; set "
                    "model.dtype=float32, or name another model"
                )
        mean, directions = whitening(blocks, self.width, key="task.retrieval.width")
        vectors = np.concatenate([whitened(block, mean, directions) for block in blocks])
        arrays = {"vectors": vectors, "mean": mean.astype(np.float32), "whitening": directions.astype(np.float32)}
        with atomic_path(parts.folder / TABLE_NAME) as temporary:
            save_file({name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}, temporary)
        files = [asdict(describe(parts.folder / TABLE_NAME))]
        write_manifest(parts.folder / MANIFEST_NAME, _FORMAT_VERSION, {"key": self._table_key, "files": files})
        sweep(parts.folder, ())

    @property
    def _table_key(self) -> str:
        return fingerprint([self.key, self.width])

    def _is_current(self, folder: Path) -> bool:
        try:
            manifest, files = read_manifest(folder / MANIFEST_NAME, _FORMAT_VERSION, "")
        except UserError:  # none, or damaged: computed again
            return False
        return manifest.get("key") == self._table_key and not damage(folder, files)


def log_counts(prepared: PreparedData) -> Tensor:
    """(I,) float32: log(1 + training count) of every item."""
    return torch.from_numpy(np.log1p(prepared.train_counts).astype(np.float32))


def _micro_batches(begins: I64, part: int) -> list[range]:
    """The items of each micro-batch of a part."""
    places = begins[part * _BATCHES_PER_PART : (part + 1) * _BATCHES_PER_PART + 1].tolist()
    return [range(first, stop) for first, stop in pairwise(places)]
