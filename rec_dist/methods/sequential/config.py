"""The section task.sequential: which recommender trains on item ids, and its shape."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section

_INT32 = 1 << 31  # what overflows in numpy


class DistilConfig(Section):
    """What the recommender learns from a teacher's lists, which `rec-dist distil` makes."""

    lists: str | None = Field(
        None,
        description="Folder of a teacher's lists, which `rec-dist distil` writes. None: no teacher.",
        json_schema_extra={"path": True},
    )
    weight: float = Field(
        0.5, gt=0, le=1, description="Share of the teacher in the loss of a target that has a list; the next item has the rest."
    )
    temperature: float = Field(
        1.0, gt=0, description="The teacher's scores are divided by it; above 1 its probabilities are more even."
    )


class SequentialConfig(Section):
    """A sequential recommender with cross-entropy over the whole catalogue.

    Changing a key that the chosen model does not read is an error.
    """

    model: Literal["sasrec", "gru4rec", "caser"] = Field("sasrec", description="Which recommender trains.")
    width: int = Field(64, ge=1, description="Item embedding width.")
    num_layers: int = Field(2, ge=1, description="sasrec: transformer blocks; gru4rec: GRU layers.")
    num_heads: int = Field(2, ge=1, description="sasrec: attention heads; divides width.")
    state_width: int = Field(128, ge=1, description="gru4rec: width of the recurrent state.")
    window: int = Field(5, ge=1, description="caser: most recent items that the convolutions read; at most max_length.")
    num_horizontal: int = Field(16, ge=1, description="caser: horizontal filters of each height from 1 to window.")
    num_vertical: int = Field(4, ge=1, description="caser: vertical filters.")
    dropout: float = Field(0.2, ge=0, lt=1, description="Dropout in layers and embeddings.")
    max_length: int = Field(100, ge=2, lt=_INT32, description="How many of its most recent items a sequence keeps.")
    num_sampled: int = Field(
        0, ge=0, description="Items drawn each step to estimate the softmax of a large catalogue; 0, or its size: use all items."
    )
    top_h: int = Field(
        0,
        ge=0,
        description="Save so many best items of each training target, and the item embeddings, for a student; 0: save neither.",
    )
    distil: DistilConfig = Field(default_factory=DistilConfig)
    init_embeddings: str | None = Field(
        None,
        description="Folder that `embed` wrote; its vectors, reduced by PCA, initialise the item embeddings. None: random.",
        json_schema_extra={"path": True},
    )
