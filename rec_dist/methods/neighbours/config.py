"""The section task.neighbours: item-to-item neighbours by title, by what was chosen next, and by a language model's vectors."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section


class NeighboursConfig(Section):
    """How the last items of a history vote for their neighbours. Fitted in seconds, without training.

    A part whose weight is 0 is left out, also as a feature of an ensemble.
    """

    decay: float = Field(0.5, gt=0, le=1, description="Weight of each item of the history, relative to the item after it.")
    max_history: int = Field(10, ge=1, description="How many of its most recent items a history keeps.")
    title_weight: float = Field(1.0, ge=0, description="Weight of the similarity of titles (cosine of TF-IDF vectors).")
    next_weight: float = Field(0.5, ge=0, description="Weight of log(1 + how often the item was chosen next).")
    embeddings: str | None = Field(
        None,
        description="Folder that `embed` wrote: cosines of its vectors, whitened, are a third kind of neighbour. None: no such part.",
        json_schema_extra={"path": True},
    )
    embedding_width: int = Field(
        128, ge=1, description="Width of these vectors after whitening; at most theirs, and the items less 1."
    )
    embedding_weight: float = Field(
        1.0, ge=0, description="Weight of the cosine of whitened vectors; has no effect without them."
    )
    popularity_weight: float = Field(
        0.1, ge=0, description="Weight of log(1 + positives in training), which also orders items that are no neighbours."
    )
    splits: list[Literal["train", "valid"]] = Field(
        ["train"],
        min_length=1,
        description="Whose targets count as chosen. With valid, for the last fit before serving or testing: valid is then no test.",
    )
    top_k: int = Field(500, ge=1, lt=1 << 31, description="Neighbours of each kind that are kept for an item.")
