"""The section `evaluate`: which questions are asked, and how scores become ranks."""

from typing import Any, Literal

from pydantic import Field

from rec_dist.config.section import Section

_ASKED = {"split", "targets", "questions", "negatives", "num_candidates", "exclude_seen", "max_users", "seed"}


class EvaluateConfig(Section):
    """How rankings are evaluated."""

    split: Literal["valid", "test"] = Field("test", description="Split to evaluate on. No effect with evaluate.questions.")
    targets: Literal["last", "all"] = Field(
        "last", description="Targets of a user's row that are asked: the last one, or each as a question of its own."
    )
    questions: str | None = Field(
        None,
        description="File (csv, JSON lines, Parquet) of questions to ask instead of a split: user, history, target. A benchmark's "
        "folder: its test file.",
    )
    ranker: Literal["model", "popularity"] = Field(
        "model", description="model: the run's model or the base model. popularity: the popularity baseline."
    )
    negatives: Literal["uniform", "low_rated"] = Field(
        "uniform",
        description="Where the other candidates are from. low_rated: from the user's explicit negatives (data.min_rating) of the "
        "training part, at most evaluate.num_candidates - 1. Users without any are left out, and with data.max_train_users those of "
        "the train split, whose explicit negatives training may have seen.",
    )
    num_candidates: int | Literal["all"] = Field(
        20, description="Candidates: one target, and the rest drawn by hash. all: the whole catalogue."
    )
    search: Literal["all", "exact"] = Field(
        "all",
        description="Language models with num_candidates=all. all: score every title. exact: search the titles for the target's "
        "rank, exact up to 100; without mrr and auc.",
    )
    exclude_seen: bool = Field(
        True, description="Leave the items of the history out of the candidates. The target itself always stays among them."
    )
    title_prior: float | Literal["valid"] = Field(
        0.0,
        description="Language models: subtract so many times the title's log-likelihood without a history. valid: the best of 0 to 1 "
        "on the validation split.",
    )
    length_power: float | Literal["valid"] = Field(
        0.0,
        description="Language models: divide by the title's number of tokens to this power. valid: the best of 0, 0.5 and 1 on the "
        "validation split.",
    )
    max_users: int | None = Field(None, ge=1, description="Users to evaluate, drawn by hash. None: all users.")
    seed: int = Field(
        0, ge=0, lt=1 << 32, description="Seed of the candidates and of the users. All models of a comparison share it."
    )
    output_dir: str | None = Field(
        None, description="Folder for the results. None: the run directory, or <run_dir>-base for a CONFIG."
    )

    @property
    def asked(self) -> dict[str, Any]:
        """The keys that say which questions are asked, and of which candidates: another model takes them over to be compared."""
        return self.model_dump(include=_ASKED)

    @property
    def corrects(self) -> bool:
        """Whether a language model's scores are corrected."""
        return self.title_prior != 0 or self.length_power != 0
