"""The section task.retrieval: how histories and items become vectors, and which softmax compares them."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section


class RetrievalConfig(Section):
    """A language model as the encoder of the history, with a softmax over the items of the catalogue."""

    width: int = Field(
        128, ge=1, description="Width of item vectors after whitening; at most the model's width and the items less 1."
    )
    pooling: Literal["mean", "last"] = Field(
        "mean", description="A title's vector is the mean of the states of its tokens, or the state of its last one."
    )
    temperature: float = Field(0.05, gt=0, description="Divides cosines and learnt terms, which gives logits.")
    learn_temperature: bool = Field(
        False, description="Learn what divides the cosines, from task.retrieval.temperature on; it goes on dividing the terms."
    )
    terms: bool = Field(
        True,
        description="Learn a weight each for the last item, for other seen items and for log(1 + training count); false: none.",
    )
    refresh_every: int = Field(
        0,
        ge=0,
        description="Steps after which the model as it is computes the item vectors again, a pass over all titles; 0: never.",
    )
    num_sampled: int = Field(
        0, ge=0, description="Items drawn each step to estimate the softmax of a large catalogue; 0, or its size: use all items."
    )
