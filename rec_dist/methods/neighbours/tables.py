"""Neighbour tables: for each item the most similar titles, the items that were chosen next, and the most similar vectors.

    title[j, i] = cosine of the TF-IDF vectors of titles j and i          next[j, i] = times that i came directly after j
    embedding[j, i] = cosine of a language model's vectors of titles j and i, whitened (methods/whitening.py)

Each keeps the top_k largest values of a row, so they take 8 * top_k bytes an item at most. Fitting multiplies blocks of rows:
memory beyond the tables is bounded by _VALUES_AT_ONCE, whatever the number of items.

I items of the catalogue, N items of all training sequences, W words of all titles.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from scipy import sparse
from sklearn.feature_extraction.text import TfidfVectorizer

from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.errors import TRAIN_AGAIN, UserError, one_line
from rec_dist.methods.whitening import whitened, whitening
from rec_dist.runtime.arrays import F32, I32, I64

TABLES_NAME = "neighbours.safetensors"
_NAMES, _PARTS = ("title", "following", "embedding"), ("data", "indices", "indptr")
_VALUES_AT_ONCE = 1 << 25  # 256 MiB of float32 values with their int32 columns
_ROWS_AT_ONCE = 100_000  # training sequences read at once

Table: TypeAlias = Any  # scipy.sparse.csr_array, (I, I) float32; scipy has no types


@dataclass(frozen=True)
class NeighbourTables:
    """title, following, embedding (I, I) float32, at most top_k values a row; embedding is None where no vectors were given.

    popularity (I,) float32: log(1 + positives in training).
    """

    title: Table
    following: Table
    popularity: npt.NDArray[np.float32]
    embedding: Table | None = None

    @property
    def num_items(self) -> int:
        """I, the size of the catalogue."""
        return len(self.popularity)

    def write(self, folder: Path) -> None:
        """Writes the tables into `folder`."""
        values = {"popularity": self.popularity}
        for name in _NAMES:
            if (table := getattr(self, name)) is None:
                continue
            values |= {f"{name}.{part}": np.ascontiguousarray(getattr(table, part)) for part in _PARTS}
        save_file(values, folder / TABLES_NAME)

    @staticmethod
    def read(folder: Path) -> "NeighbourTables":
        """Reads what write() wrote. Raises UserError if the file is missing or damaged."""
        path = folder / TABLES_NAME
        if not path.is_file():
            raise UserError(f"{folder} holds no neighbours ({TABLES_NAME} is missing); let its run finish first")
        try:
            values = load_file(path)
            size = len(values["popularity"])
            tables = {
                name: sparse.csr_array(tuple(values[f"{name}.{part}"] for part in _PARTS), shape=(size, size))
                for name in _NAMES
                if name != "embedding" or "embedding.data" in values
            }
        except (OSError, SafetensorError, ValueError, KeyError) as fault:
            raise UserError(f"{path} is damaged ({one_line(fault)}); {TRAIN_AGAIN}") from fault
        return NeighbourTables(**tables, popularity=values["popularity"])


def fit_tables(
    data: PreparedData,
    *,
    top_k: int,
    splits: Sequence[str] = ("train",),
    vectors: Sequence[F32] = (),
    width: int = 1,
) -> NeighbourTables:
    """The tables of the catalogue, and of the targets of `splits`. vectors (n, D): blocks of items, whitened to `width`."""
    rows = [data.split(name) for name in dict.fromkeys(splits)]
    counts = data.train_counts + sum(target_counts(split, data.num_items) for split in rows if split.name != "train")
    return NeighbourTables(
        title=similar_titles(data.titles, top_k=top_k),
        following=next_items(rows, data.num_items, top_k=top_k),
        popularity=np.log1p(counts).astype(np.float32),
        embedding=similar_vectors(vectors, width, top_k=top_k) if vectors else None,
    )


def similar_titles(titles: list[str], *, top_k: int) -> Table:
    """(I, I) cosines of the titles' TF-IDF vectors, the top_k largest of each row; an item is no neighbour of itself.

    Words are runs of letters and digits, in lower case.
    """
    vectorizer = TfidfVectorizer(token_pattern=r"(?u)\b\w+\b", sublinear_tf=True, dtype=np.float32)
    try:
        vectors = sparse.csr_array(vectorizer.fit_transform(titles))  # (I, W), rows of length 1
    except ValueError:  # no title has a word
        return sparse.csr_array((len(titles), len(titles)), dtype=np.float32)
    words = sparse.csr_array(vectors.T)
    shared = np.asarray((vectors > 0) @ np.diff(words.indptr))  # (I,) an upper bound of the neighbours of each title
    blocks = []
    for rows in _blocks(shared):
        products = sparse.csr_array(vectors[rows] @ words)
        own = products.indices == np.repeat(np.arange(rows.start, rows.stop), np.diff(products.indptr))
        products.data[own] = 0
        blocks.append(_largest(products, top_k))
    return sparse.csr_array(sparse.vstack(blocks, format="csr"))


def similar_vectors(blocks: Sequence[F32], width: int, *, top_k: int) -> Table:
    """blocks (n, D) of vectors -> (I, I) cosines after whitening, the top_k largest of each row; no item is its own neighbour.

    Raises UserError as whitening().
    """
    mean, directions = whitening(blocks, width, key="task.neighbours.embedding_width")
    vectors = np.concatenate([whitened(block, mean, directions) for block in blocks])  # (I, W)
    num_items, found = len(vectors), []
    kept = min(top_k, num_items)
    for rows in _blocks(np.full(num_items, num_items)):
        cosines = vectors[rows] @ vectors.T
        cosines[np.arange(len(cosines)), np.arange(num_items)[rows]] = 0
        best = np.argpartition(-cosines, kept - 1, axis=1)[:, :kept]  # (n, kept), in no order
        starts = np.arange(0, best.size + 1, kept)
        values = np.take_along_axis(cosines, best, axis=1)
        found.append(_largest(sparse.csr_array((values.ravel(), best.ravel(), starts), shape=cosines.shape), kept))
    return sparse.csr_array(sparse.vstack(found, format="csr"))


def next_items(splits: Sequence[SequenceSplit], num_items: int, *, top_k: int) -> Table:
    """(I, I) how often each item came directly before a target of `splits`, the top_k largest of each row.

    Targets alone, because rows of a validation split may begin with what the training split holds already.
    """
    counts = sparse.csr_array((num_items, num_items), dtype=np.float32)
    for split in splits:
        for items, targets in _targets(split):
            pairs = (items[targets - 1], items[targets])
            ones = np.ones(len(targets), dtype=np.float32)
            counts = counts + sparse.csr_array((ones, pairs), shape=(num_items, num_items), dtype=np.float32)
    return _largest(sparse.csr_array(counts), top_k)


def target_counts(split: SequenceSplit, num_items: int) -> I64:
    """(I,) how often each item is a target of `split`."""
    counts = np.zeros(num_items, dtype=np.int64)
    for items, targets in _targets(split):
        counts += np.bincount(items[targets], minlength=num_items)
    return counts


def _targets(split: SequenceSplit) -> Iterator[tuple[I32, I64]]:
    """Blocks of rows: their items one after another, and the places of the targets among them."""
    lengths = np.diff(split.offsets)
    for begin in range(0, len(split), _ROWS_AT_ONCE):
        rows: I64 = np.arange(begin, min(begin + _ROWS_AT_ONCE, len(split)))
        sizes = lengths[rows]
        positions = np.arange(sizes.sum()) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        yield split.take(rows, sizes), np.flatnonzero(positions >= np.repeat(split.first_target[rows], sizes))


def _blocks(sizes: npt.NDArray[np.int64]) -> list[slice]:
    """Consecutive rows whose sizes add up to _VALUES_AT_ONCE at most, or single rows."""
    blocks, begin, held = [], 0, 0
    for row, size in enumerate(sizes.tolist()):
        if held + size > _VALUES_AT_ONCE and row > begin:
            blocks.append(slice(begin, row))
            begin, held = row, 0
        held += size
    return [*blocks, slice(begin, len(sizes))]


def _largest(table: Table, top_k: int) -> Table:
    """`table` with the top_k largest values of each row, all above 0; equal values keep the smaller columns."""
    rows = np.repeat(np.arange(table.shape[0]), np.diff(table.indptr))
    order = np.lexsort((table.indices, -table.data, rows))  # by row, then from the largest value
    place = np.arange(len(order)) - np.repeat(table.indptr[:-1], np.diff(table.indptr))
    kept = np.sort(order[(place < top_k) & (table.data[order] > 0)])
    columns = table.indices[kept].astype(np.int32)
    return sparse.csr_array((table.data[kept].astype(np.float32), (rows[kept], columns)), shape=table.shape)
