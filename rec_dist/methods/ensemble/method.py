"""Ensembles as a method: weights are learnt on the validation split, in seconds, and the result ranks like any run."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData, open_data
from rec_dist.data.dataset.schema import ITEMS_NAME
from rec_dist.errors import UserError
from rec_dist.methods.ensemble.config import EnsembleConfig
from rec_dist.methods.ensemble.features import member_of
from rec_dist.methods.ensemble.members import Member, copy_members, feature_blocks, members_of, served_members
from rec_dist.methods.ensemble.questions import QuestionTable, validation_config
from rec_dist.methods.ensemble.ranker import EnsembleRanker
from rec_dist.methods.ensemble.rerank import Retrieval, read_titles, two_stages
from rec_dist.methods.ensemble.saved_model import EnsembleWeights
from rec_dist.methods.ensemble.weights import Questions, fit_weights
from rec_dist.methods.eval_examples import eval_examples_of
from rec_dist.methods.initial_weights import InitialWeights
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.runtime.run_directory import RunDirectory


class Ensemble:
    """Implements FittedMethod."""

    name = "ensemble"
    section = ("ensemble", EnsembleConfig)
    ranker = EnsembleRanker()

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """The model folders of the members. Raises UserError for a member that is missing or not finished."""
        settings = config.task.section(EnsembleConfig)
        learnt = members_of(settings)
        served = served_members(settings, learnt)
        names = [(member.name, member.folder) for member in learnt]
        names += [(f"{member.name} as served", member.folder) for member in served if member not in learnt]
        return InitialWeights(Path(), members=tuple(names))

    def check_fit(self, config: RunConfig, initial: InitialWeights) -> None:
        """As FittedMethod.check_fit."""
        self._members(config)
        validation_config(config, open_data(config.data))

    def fit(self, config: RunConfig, initial: InitialWeights, folder: Path, run: RunDirectory, launch: Launch) -> dict[str, Any]:
        """As FittedMethod.fit."""
        data, settings = open_data(config.data), config.task.section(EnsembleConfig)
        members, served = self._members(config)
        names, questions, retrieval = self._features(config, data, members, run, launch)
        learnt = learn(questions, names, [member.name for member in members], list(settings.terms), ridge=settings.ridge)
        learnt = replace(learnt, retrieval=retrieval)
        learnt.write(folder, data)
        copy_members(served, folder)
        data.copy_items(folder / ITEMS_NAME)
        run.log(
            f"weights from {len(questions.targets):,} validation targets among {questions.ranked.shape[1]:,} items, "
            "for a standard deviation of each score:"
        )
        for name, weight, scale in zip(names, learnt.weights, learnt.scales, strict=True):
            run.log(f"  {name}: {weight * scale:+.3f}")
        return {}

    def plan(self, config: RunConfig) -> NoReturn:
        """Raises UserError: `plan` is about language models."""
        raise UserError(f"task.kind={self.name} needs no GPU of its own; plan its language model by that run's CONFIG")

    def _members(self, config: RunConfig) -> tuple[list[Member], list[Member]]:
        """The members whose weights are learnt, and those that rank, checked."""
        settings, data = config.task.section(EnsembleConfig), open_data(config.data)
        members = members_of(settings)
        served = served_members(settings, members)
        for member in (*members, *(member for member in served if member not in members)):
            member.check(data)
        two_stages(members, settings.rerank)
        return members, served

    def _features(
        self, config: RunConfig, data: PreparedData, members: Sequence[Member], run: RunDirectory, launch: Launch
    ) -> tuple[list[str], Questions, Retrieval | None]:
        """The names of the features, the questions with them, and the first stage of two, which is learnt from the same ones."""
        asked = validation_config(config, data)
        examples = list(eval_examples_of(asked, data))
        settings = config.task.section(EnsembleConfig)
        cheap, reading = two_stages(members, settings.rerank)
        evaluation = Evaluation(asked, data, examples, InitialWeights(Path()), None, run)
        table = QuestionTable(examples)
        for _, features in feature_blocks(cheap, settings.terms, evaluation, launch):
            table.add(features)
        if settings.rerank is None:
            return table.names, table.questions(), None
        retrieval = learn_retrieval(table, [member.name for member in cheap], num=settings.rerank, ridge=settings.ridge)
        read = read_titles(reading, table.places(examples, retrieval), evaluation, launch)
        run.log(f"the {settings.rerank} items retrieved hold {read.found(0, examples).mean():.1%} of the validation targets")
        table.add_features(read.features(0, [e.candidates for e in examples]))
        return table.names, table.questions(), retrieval


def learn_retrieval(table: QuestionTable, members: list[str], *, num: int, ridge: float) -> Retrieval:
    """The first stage of `num` items, from the features that the table holds by now. Weights of members are at least 0."""
    questions = table.questions()
    at_least = np.where([member_of(name) in members for name in table.names], 0.0, -np.inf)
    used = np.ones(len(table.names), dtype=bool)
    weights = fit_weights(questions, questions.scales(), at_least=at_least, ridge=ridge, used=used)
    return Retrieval(num, list(table.names), weights)


def learn(questions: Questions, features: list[str], members: list[str], terms: list[str], *, ridge: float) -> EnsembleWeights:
    """The weights of all features, and those without each member and term. Weights of members are at least 0."""
    owners = [*members, *terms]
    owner_of = np.asarray([owners.index(member_of(name)) for name in features])
    at_least = np.where(owner_of < len(members), 0.0, -np.inf)
    scales = questions.scales()
    used = np.ones(len(features), dtype=bool)
    weights = fit_weights(questions, scales, at_least=at_least, ridge=ridge, used=used)
    without = np.stack(
        [fit_weights(questions, scales, at_least=at_least, ridge=ridge, used=owner_of != owner) for owner in range(len(owners))]
    )
    return EnsembleWeights(members, terms, features, owners, weights, without, scales)


ENSEMBLE = Ensemble()
