"""The section task.p2rec: stage 1 of P2Rec, which tunes a language model to say what kinds of items a user prefers."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section


class P2RecConfig(Section):
    """Whose item embeddings make the categories, how a prompt becomes one state, and which loss compares the two."""

    teacher: str | None = Field(
        None,
        description="Run directory of a recommender trained with task.sequential.top_h.",
        json_schema_extra={"path": True},
    )
    num_categories: int = Field(
        64, ge=2, lt=1 << 31, description="C, latent categories: k-means on the teacher's item embeddings."
    )
    loss: Literal["kl", "mse"] = Field(
        "kl",
        description="kl: of the user's distribution from the softmax of the reading. mse: mean squared error of the reading.",
    )
    pooling: Literal["last", "mean"] = Field(
        "last", description="One state of a prompt, for `embed` too. last: its last row. mean: its rows behind the instruction."
    )
    shuffle_categories: bool = Field(
        False, description="A control: the categories are exchanged among the items, so that they mean nothing."
    )
