"""A language model that ranks items, as a task: any objective on the log-probs of completions, with interactions as examples.

`language_model` is the part that every task with completions shares; preference_rows.py puts other data beside it.
"""

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from rec_dist.data.sampling.global_batches import GlobalBatchSampler
from rec_dist.methods.language_model.interaction_examples import InteractionExamples
from rec_dist.methods.language_model.objective import Objective
from rec_dist.methods.language_model.saved_model import save_run_model
from rec_dist.methods.task import Reference, Score, Task, TaskModel
from rec_dist.models.assemble import ModelSpec, build_model
from rec_dist.models.scorer import Scorer, check_scorer


def language_task(
    objective: Objective,
    model: ModelSpec,
    examples: InteractionExamples,
    *,
    sampler: GlobalBatchSampler,
    reference_key: str,
    width: int,
) -> Task:
    """Train `model` (of `width`) with `objective` on interactions. Call examples.check() first, since this checks nothing."""

    def save(weights: dict[str, Tensor], module: nn.Module, folder: Path) -> None:
        save_run_model(weights, module, model, examples.builder, examples.prepared, folder)

    return Task(
        name=objective.name,
        sampler=sampler,
        data=examples,
        model=language_model(objective, model, width=width),
        save=save,
        reference=Reference(reference_key, examples.draw_epoch) if objective.needs_reference else None,
        notes=lambda: examples.notes(sampler),
    )


def language_model(objective: Objective, spec: ModelSpec, *, width: int) -> TaskModel:
    """The scorer around the model of `spec`, with the loss of `objective`. If there is an adapter, it alone trains."""

    def build() -> nn.Module:
        model = build_model(spec)
        return Scorer(model, objective.loss, objective.metric_names, objective.preference)

    def check(module: Any, score: Score) -> None:
        check_scorer(module, score, dtype=spec.dtype)

    return TaskModel(
        build=build,
        dtype=spec.dtype,
        width=width,
        metric_names=objective.metric_names,
        mean_over="tokens" if objective.counts_tokens else "groups",
        check=check,
        spec=spec,
    )
