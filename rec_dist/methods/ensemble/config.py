"""The section task.ensemble: which finished runs rank together, and how their weights are learnt."""

from typing import Literal

from pydantic import Field

from rec_dist.config.section import Section

TERMS = ("popularity", "seen", "last_item")


class EnsembleConfig(Section):
    """A weighted sum of the scores of finished runs, with weights learnt on the validation split."""

    members: dict[str, str] = Field(
        default_factory=dict,
        description="Run directories by the name that tables show, at least one. All were trained on data.path.",
        json_schema_extra={"path": True},
    )
    served: dict[str, str] = Field(
        default_factory=dict,
        description="Runs that take the place of members once the weights are learnt, such as the same recommender trained on the "
        "validation users too.",
        json_schema_extra={"path": True},
    )
    terms: list[Literal["popularity", "seen", "last_item"]] = Field(
        default_factory=lambda: list(TERMS),
        description="Scores that every ensemble can have besides its members: log popularity, and whether an item is in the "
        "history or is its last item.",
    )
    num_candidates: int | Literal["all"] = Field(
        "all",
        description="Candidates of a validation target: all items, or so many drawn by hash, for members that score few items a "
        "second.",
    )
    max_questions: int = Field(5000, ge=1, lt=1 << 31, description="Most validation targets that the weights are learnt from.")
    ridge: float = Field(1e-3, gt=0, description="Weight of the squared weights beside the mean loss of a target in nats.")
