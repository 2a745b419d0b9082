"""The members of an ensemble: finished runs, where they lie, and how each scores.

An ensemble keeps a copy of its members (their model/ and config.yaml), so it stays what it was when they are trained again.
"""

import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.prepared_data import PreparedData
from rec_dist.errors import UserError
from rec_dist.evaluation.baselines import CandidateScorer, Floats
from rec_dist.evaluation.examples import EvalExample
from rec_dist.evaluation.measure import blocks_of
from rec_dist.methods.ensemble.config import TERMS, EnsembleConfig
from rec_dist.methods.ensemble.features import parts_of, terms_of
from rec_dist.methods.ensemble.folder import MEMBERS_NAME
from rec_dist.methods.finished_run import FinishedRun, open_finished, saved_config
from rec_dist.methods.method import Evaluation, Launch
from rec_dist.storage.checksums import verify_checksums

Features = Callable[[list[EvalExample]], dict[str, list[Floats]]]  # (C_u,) of each example by the name of the feature
FeatureBlock = tuple[list[EvalExample], dict[str, list[Floats]]]  # examples, and (C_u,) of each by the name of the feature


@dataclass(frozen=True)
class Member(FinishedRun):
    """A finished run under the name that tables show."""

    name: str

    @property
    def on_workers(self) -> bool:
        """Whether a language model in it scores on the workers of a cluster."""
        inner = self.folder / MEMBERS_NAME
        names = [path.name for path in inner.iterdir()] if inner.is_dir() else []
        return self.ranker.language_model or any(member.on_workers for member in copied_members(self.folder, names))

    @property
    def scores_titles(self) -> bool:
        """As Ranker.scores_titles."""
        return self.ranker.scores_titles(self.folder)

    def titles_read(self, num_candidates: int) -> int:
        """As Ranker.titles_read."""
        return self.ranker.titles_read(self.folder, num_candidates)

    @property
    def has_members(self) -> bool:
        """Whether it is an ensemble."""
        return (self.folder / MEMBERS_NAME).is_dir()

    def check(self, data: PreparedData) -> None:
        """Raises UserError if the member is damaged or cannot rank on `data`."""
        verify_checksums(self.folder)
        self.ranker.check(self.folder, data)

    @contextmanager
    def scoring(self, config: RunConfig, data: PreparedData, device: str) -> Iterator[CandidateScorer]:
        """A scorer of the member in this process. config: of the command, for its data, cluster and evaluation."""
        own, ranker = self.on(config), self.ranker
        with ranker.scoring(own, data, ranker.weights(own, self.folder), self.folder, device) as scorer:
            yield scorer

    @contextmanager
    def reading(self, evaluation: Evaluation, launch: Launch) -> Iterator[Features]:
        """Gives what the member scores, for blocks of the examples in their order.

        On workers, which score all examples first, if a language model is in it, else in this process.
        """
        if self.on_workers:
            own, ranker = self.on(evaluation.config), self.ranker
            asked = replace(evaluation, config=own, initial=ranker.weights(own, self.folder), saved=self.folder)
            given = iter(ranker.score(asked, launch)[0])
            yield lambda block: {self.name: [scores.astype(np.float64) for scores in islice(given, len(block))]}
            return
        with self.scoring(evaluation.config, evaluation.data, "cpu") as scorer:
            yield lambda block: parts_of(self.name, scorer, [e.history for e in block], [e.candidates for e in block])


def on_workers(members: Sequence[Member]) -> bool:
    """Whether a member scores on workers, which are worth starting once for all examples."""
    return any(member.on_workers for member in members)


def members_of(settings: EnsembleConfig) -> list[Member]:
    """The members whose weights are learnt. Raises UserError for a run that is missing or not finished."""
    if not settings.members:
        raise UserError(
            "task.ensemble.members is empty; name at least one finished run, such as task.ensemble.members.sasrec=RUN"
        )
    return [_member("members", name, Path(folder)) for name, folder in settings.members.items()]


def served_members(settings: EnsembleConfig, members: Sequence[Member]) -> list[Member]:
    """The members that rank: those of `served` in the place of those whose weights were learnt, `members`. Raises UserError."""
    if unknown := [name for name in settings.served if name not in settings.members]:
        raise UserError(f"task.ensemble.served.{unknown[0]} is no member; the members are {', '.join(settings.members)}")
    chosen = []
    for member in members:
        if (folder := settings.served.get(member.name)) is not None:
            other = _member("served", member.name, Path(folder))
            if (was := member.config.task.kind) != (now := other.config.task.kind):
                raise UserError(
                    f"task.ensemble.served.{member.name} is a run of task.kind={now}, and the member one of {was}; their scores "
                    "would have other scales"
                )
            member = other
        chosen.append(member)
    return chosen


def _member(place: str, name: str, folder: Path) -> Member:
    key = f"task.ensemble.{place}.{name}"
    if not name.replace("-", "_").isidentifier():
        raise UserError(f"{key}: a member's name consists of letters, digits, _ and -; give it another")
    if name in TERMS:
        raise UserError(f"{key} has the name of a term ({', '.join(TERMS)}); give it another")
    run = open_finished(key, folder)
    return Member(run.config, run.folder, name)


def copy_members(members: list[Member], folder: Path) -> None:
    """Copies the members into the ensemble's model folder."""
    for member in members:
        target = folder / MEMBERS_NAME / member.name
        target.mkdir(parents=True)
        shutil.copyfile(member.folder.parent / "config.yaml", target / "config.yaml")
        for source in sorted(path for path in member.folder.rglob("*") if path.is_file()):  # copytree hides that the disk is full
            copy = target / "model" / source.relative_to(member.folder)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source, copy)


def copied_members(folder: Path, names: list[str]) -> list[Member]:
    """The copies that copy_members() wrote into `folder`. Raises UserError if one is missing."""
    members = []
    for name in names:
        copy = folder / MEMBERS_NAME / name
        if not (copy / "config.yaml").is_file() or not (copy / "model").is_dir():
            raise UserError(f"{folder} lacks its member {name} ({copy}); train the ensemble again")
        members.append(Member(saved_config(copy / "config.yaml"), copy / "model", name))
    return members


def feature_blocks(
    members: Sequence[Member], terms: Sequence[str], evaluation: Evaluation, launch: Launch
) -> Iterator[FeatureBlock]:
    """Blocks of the examples with their features by name, (C_u,) for every example. Workers, if any, are started once."""
    done = 0
    with ExitStack() as stack:
        readers = [stack.enter_context(member.reading(evaluation, launch)) for member in members]
        for block in blocks_of(evaluation.examples):
            features: dict[str, list[Floats]] = {}
            for read in readers:
                features |= read(block)
            histories, candidates = [e.history for e in block], [e.candidates for e in block]
            done += len(block)
            evaluation.run.progress("evaluate", done, len(evaluation.examples))
            yield block, features | terms_of(terms, evaluation.data.train_counts, histories, candidates)
