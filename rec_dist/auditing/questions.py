"""What an audit looks at: the questions of an evaluation, the data set behind them, and the model of a run.

N questions, C candidates of a question, I items of the catalogue.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np

from rec_dist.data.dataset.preferences import PreferenceData
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.evaluation.baselines import CandidateScorer, Floats, PopularityScorer
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import ranks_of, score_in_blocks
from rec_dist.methods.neighbours.config import NeighboursConfig
from rec_dist.runtime.arrays import I32, I64


@dataclass(frozen=True)
class Questions:
    """targets (N,), users (N,); candidates[n] (C_n,) include the target, in the order in which they stand.

    source: where they come from, for readers. given: whether somebody else chose the candidates. ranks_all: every item is ranked,
    so nothing was chosen.
    """

    source: str
    users: I64
    targets: I32
    candidates: Sequence[I32]
    given: bool
    ranks_all: bool

    def __len__(self) -> int:
        return len(self.targets)

    @property
    def sizes(self) -> I64:
        """(N,): C of each question."""
        return np.asarray([len(items) for items in self.candidates], dtype=np.int64)


def questions_of_examples(examples: Sequence[EvalExample], *, source: str, ranks_all: bool) -> Questions:
    """The questions that evaluation asks."""
    return Questions(
        source,
        np.asarray([example.user_id for example in examples], dtype=np.int64),
        np.asarray([example.target for example in examples], dtype=np.int32),
        [example.candidates for example in examples],
        given=examples[0].given,
        ranks_all=ranks_all,
    )


def questions_of_preferences(data: PreferenceData) -> Questions:
    """Preference rows as questions: the chosen completion is the target, and each distinct text is an item.

    Each row is a user of its own, since the rows name none. The chosen one stands first by the format, so places say nothing.
    """
    number: dict[str, int] = {}
    rows = [
        np.asarray([number.setdefault(text.strip(), len(number)) for text in row.completions], dtype=np.int32)
        for block in data.rows()
        for row in block
    ]
    targets = np.asarray([items[0] for items in rows], dtype=np.int32)
    return Questions("the preference rows", np.arange(len(rows)), targets, rows, given=True, ranks_all=False)


@dataclass(frozen=True)
class AuditedModel:
    """The model of a run. window: how many items at the end of a history every check may reorder.

    slow: as in Ranker.scores_titles. base: the folder of the language model that the run began with, None for other models.
    """

    scorer: CandidateScorer
    slow: bool
    window: int
    base: Path | None
    trust_remote_code: bool = False


@dataclass(frozen=True)
class Subject:
    """What is audited. data: None for preference rows, which have no examples either. split: None if a file asks.

    model: None where a data set is audited alone. seed: of every draw of the checks.
    """

    questions: Questions
    data: PreparedData | None = None
    examples: Sequence[EvalExample] = ()
    split: str | None = None
    model: AuditedModel | None = None
    seed: int = 0

    @cached_property
    def scores(self) -> list[Floats]:
        """The model's scores of each question's candidates, (C,) each."""
        assert self.model is not None
        return self.scored(self.model.scorer, self.examples)

    @cached_property
    def ranks(self) -> I32:
        """(N,): the rank of each target by the model, from 1; ties count against it."""
        return ranks_of(self.examples, self.scores)

    @cached_property
    def baselines(self) -> dict[str, CandidateScorer]:
        """Popularity and neighbours of the training split, without their settings being chosen on anything."""
        from rec_dist.methods.neighbours.scorer import NeighboursScorer  # scikit-learn takes a second to import
        from rec_dist.methods.neighbours.tables import fit_tables

        assert self.data is not None
        settings = NeighboursConfig()
        tables = fit_tables(self.data, top_k=settings.top_k)
        return {"popularity": PopularityScorer(self.data.train_counts), "nearest neighbours": NeighboursScorer(tables, settings)}

    def ranks_by(self, scorer: CandidateScorer, examples: Sequence[EvalExample]) -> I32:
        """(N,): as ranks, by another scorer or for changed examples."""
        return ranks_of(examples, self.scored(scorer, examples))

    @staticmethod
    def scored(scorer: CandidateScorer, examples: Sequence[EvalExample]) -> list[Floats]:
        """A scorer's scores of each example's candidates."""
        return list(score_in_blocks(scorer, examples))
