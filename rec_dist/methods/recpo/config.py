"""The section task.recpo: how RecPO turns ratings and recency into the margins of its loss."""

from pydantic import Field

from rec_dist.config.section import Section


class RecpoConfig(Section):
    """margin_i = margin * phi(chosen) / phi(rejected_i), with phi = rating / (1 + delay)^decay."""

    margin: float = Field(2.0, ge=0, description="Weight of the margins, in units of the reward. 0 is S-DPO.")
    decay: float = Field(0.5, ge=0, description="Exponent with which an item counts less, the later its user takes it.")
    ratings: bool = Field(True, description="Whether ratings count. false: every rating is 1, and recency alone is left.")
    unseen_rating: float = Field(3.0, gt=0, description="Rating of a rejected item that its user never rates.")
    unseen_delay: int = Field(10, ge=1, description="Delay of such an item, in items after the chosen one.")
