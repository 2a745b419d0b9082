"""Ranking metrics a user, and their intervals over users. Plain numpy."""

from rec_dist.metrics.bootstrap import Interval, bootstrap_interval, paired_difference
from rec_dist.metrics.ranking import (
    auc,
    group_ranks,
    hit_rate,
    ndcg,
    ranking_metrics,
    reciprocal_rank,
    target_ranks,
)

__all__ = [
    "Interval",
    "auc",
    "bootstrap_interval",
    "group_ranks",
    "hit_rate",
    "ndcg",
    "paired_difference",
    "ranking_metrics",
    "reciprocal_rank",
    "target_ranks",
]
