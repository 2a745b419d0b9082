"""MSL (arXiv 2504.04178): supervised fine-tuning whose softmax knows the catalogue.

L = -sum_t log( exp(z_t[y_t] / tau) / sum_{v in A(y_<t)} exp(z_t[v] / tau) ), a mean over tokens, with z_t the logits and A(y_<t) the
tokens that some title goes on with after y_<t. A token without an alternative costs exactly nothing. The same softmax ranks: a
title's score is its log-probability among the titles of the catalogue.
"""

from torch import Tensor

from rec_dist.config.schema import RunConfig
from rec_dist.losses import LossSums, likelihood_sums
from rec_dist.methods.language_model.method import LanguageModelMethod
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist.methods.msl.config import MslConfig
from rec_dist.packing.packed_batch import PackedBatch


def msl(*, temperature: float) -> Objective:
    """One completion per group, within the catalogue. temperature > 0: tau."""

    def loss(logps: Tensor, batch: PackedBatch) -> LossSums:
        return likelihood_sums(logps, batch.completion_offsets, group_weights=batch.completion_weights)

    return Objective(
        "msl",
        num_negatives=0,
        needs_reference=False,
        counts_tokens=True,
        metric_names=(),
        loss=loss,
        temperature=temperature,
    )


def _temperature(config: RunConfig) -> float:
    return config.task.section(MslConfig).temperature


class Msl(LanguageModelMethod):
    """SFT on interactions, and ranking, by the softmax over the catalogue."""

    name = "msl"
    section = ("msl", MslConfig)
    ranker = LanguageModelRanker(_temperature)
    takes_preference_rows = False

    def objective(self, config: RunConfig, num_rejected: int) -> Objective:
        """The objective with task.msl.temperature."""
        return msl(temperature=_temperature(config))


MSL = Msl()
