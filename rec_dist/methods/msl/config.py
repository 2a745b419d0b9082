"""The section task.msl: the softmax over the tokens that some title of the catalogue goes on with."""

from pydantic import Field

from rec_dist.config.section import Section


class MslConfig(Section):
    """Of training and of ranking."""

    temperature: float = Field(1.0, gt=0, description="Divides the logits. Above 1, tokens that are already likely still learn.")
