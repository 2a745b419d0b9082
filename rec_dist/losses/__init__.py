"""Losses as sums and counts. The mean is taken once, over all ranks and micro-batches."""

from rec_dist.losses.likelihood import likelihood_sums
from rec_dist.losses.preference import preference_sums, reward_metrics
from rec_dist.losses.sums import LossSums

__all__ = ["LossSums", "likelihood_sums", "preference_sums", "reward_metrics"]
