"""The section task.ensemble: which finished runs rank together, and how their weights are learnt."""

from typing import Annotated, Literal, get_args

from pydantic import Field

from rec_dist.config.section import Section

Term = Literal["popularity", "seen", "last_item"]
TERMS: tuple[Term, ...] = get_args(Term)


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
    terms: list[Term] = Field(
        list(TERMS),
        description="Scores that every ensemble can have besides its members: log popularity, and whether an item is in the "
        "history or is its last item.",
    )
    rerank: int | None = Field(
        None,
        ge=1,
        description="Items that the other members retrieve for each question; language models score the titles of these alone. "
        "None: of all candidates.",
    )
    num_candidates: Annotated[int, Field(ge=2)] | Literal["all"] = Field(
        "all",
        description="Candidates of a validation target: all items, or so many drawn by hash, for members that score few items a "
        "second.",
    )
    max_users: int = Field(
        5000, ge=1, lt=1 << 31, description="Most validation users whose targets the weights are learnt from, drawn by hash."
    )
    ridge: float = Field(1e-3, gt=0, description="Weight of the squared weights beside the mean loss of a target in nats.")
