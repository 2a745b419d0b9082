"""The base of a method that trains a language model on completions: its subclass gives a name and a loss."""

from abc import ABC, abstractmethod
from dataclasses import replace
from pathlib import Path

from rec_dist.config.schema import RunConfig
from rec_dist.config.section import Section
from rec_dist.data.dataset.manifest import PREFERENCES, Manifest
from rec_dist.errors import UserError
from rec_dist.methods.initial_weights import InitialWeights, resolve_initial_weights
from rec_dist.methods.language_model.build import build_language_task, build_text_task
from rec_dist.methods.language_model.builders import usable
from rec_dist.methods.language_model.hard_negatives import make_hard_negatives, source_of
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.ranker import LanguageModelRanker
from rec_dist.methods.method import Launch, PlannedPrompts, Ranker
from rec_dist.methods.task import Task
from rec_dist.models.pretrained import resolve_model
from rec_dist.runtime.run_directory import RunDirectory


class LanguageModelMethod(ABC):
    """Implements Method for an Objective. max_rejected: the most rejected completions of a group, None without a limit."""

    name: str
    section: tuple[str, type[Section]] | None = None
    ranker: Ranker = LanguageModelRanker()
    takes_preference_rows = True
    max_rejected: int | None = None

    @abstractmethod
    def objective(self, config: RunConfig, num_rejected: int) -> Objective:
        """The loss for up to num_rejected rejected completions a group. Raises UserError if it takes another number."""

    def initial_weights(self, config: RunConfig) -> InitialWeights:
        """model.path, or the run in train.init_from; with negatives.kind=model also the run that ranks negatives."""
        initial = find_language_model(config)
        if config.negatives.kind != "model":
            return initial
        return replace(initial, members=(("of negatives.model", source_of(config).folder),))

    def build(self, config: RunConfig, initial: InitialWeights, device: str, *, split: str = "train") -> Task:
        """The task on interactions, or on preference rows, which have no validation split."""
        self._check_adapter(config)
        if Manifest.load(config.data.path).kind != PREFERENCES:
            objective = self.objective(config, config.negatives.num)
            return build_language_task(config, initial, device, objective=objective, split=split)
        if split != "train":
            raise UserError(
                f"data.path ({config.data.path}) holds preference rows, which all train, so there is no {split} split; "
                "set checkpoint.validation_examples=0"
            )
        if not self.takes_preference_rows:
            raise UserError(
                f"data.path holds preference rows, and task.kind={self.name} ranks items; "
                "set it to sft, dpo, dmpo, sdpo, mppo or dynamicpo"
            )
        return build_text_task(
            config, initial, device, objective_for=lambda num: self.objective(config, num), max_rejected=self.max_rejected
        )

    def prepare_run(self, config: RunConfig, run: RunDirectory, launch: Launch) -> None:
        """As PreparesRun: the lists of negatives.kind=model."""
        if config.negatives.kind == "model":
            make_hard_negatives(config, run, launch)

    def plan(self, config: RunConfig) -> PlannedPrompts:
        """One prompt a group."""
        self._check_adapter(config)
        objective = self.objective(config, config.negatives.num)
        return PlannedPrompts(objective.num_negatives, objective.needs_reference)

    def _check_adapter(self, config: RunConfig) -> None:
        if config.adapter.kind == "soft_prompt":
            raise UserError(
                f"adapter.kind=soft_prompt trains under task.kind=delrec_distill, not {self.name}; set adapter.kind=lora"
            )


def find_language_model(config: RunConfig) -> InitialWeights:
    """model.path, or the run in train.init_from. Raises UserError if it is missing, damaged, or does not go with the adapter."""
    init_from = config.train.init_from
    initial = resolve_initial_weights(
        resolve_model(config.model.path, config.model.revision, trust_remote_code=config.model.trust_remote_code),
        Path(init_from) if init_from else None,
        adapter_kind=config.adapter.kind,
    )
    return usable(config, initial, trains=True)
