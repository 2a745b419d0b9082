"""Retrieval as a method: what it starts from, its task, and how its models rank."""

from typing import NoReturn

from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.language_model.method import find_language_model
from rec_dist.methods.retrieval.config import RetrievalConfig
from rec_dist.methods.retrieval.ranker import RetrievalRanker
from rec_dist.methods.retrieval.task import build_retrieval_task
from rec_dist.methods.task import Task


class Retrieval:
    """Implements Method."""

    name = "retrieval"
    section = ("retrieval", RetrievalConfig)
    ranker = RetrievalRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """model.path, or the run in train.init_from."""
        return find_language_model(config)

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """As Method.build."""
        return build_retrieval_task(config, initial, device, split=split)

    def plan(self, config: RunConfig) -> NoReturn:
        """Raises UserError: nothing is scored after the prompt."""
        raise UserError(
            f"task.kind={self.name} has no completions to count; plan it with task.kind=sft and the same prompts, which also "
            "counts the work of the language-model head"
        )


RETRIEVAL = Retrieval()
