"""The section task.p2rec: stage 1 of P2Rec, which tunes a language model to predict the categories that a user prefers."""

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
        description="kl: KL divergence of the prediction's softmax from the user's distribution. mse: mean squared error.",
    )
    pooling: Literal["last", "mean"] = Field(
        "last",
        description="One state of a prompt, for `embed` too. last: its last row. mean: its rows after the instruction.",
    )
    shuffle_categories: bool = Field(
        False, description="A control: permute the categories among the items, so that they carry no meaning."
    )
