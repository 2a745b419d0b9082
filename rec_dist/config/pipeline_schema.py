"""The keys of a file for `rec-dist run`: its sections `pipeline`, `runs`, `vars` and `matrix`."""

from typing import Annotated, Any, Literal

from pydantic import Field

from rec_dist.config.section import Section

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
Value = str | int | float
TABLE_METRICS = ("hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr")  # columns of a table, unless a file names others


class StageConfig(Section):
    """One stage: `rec-dist DO TARGET [TO] SET...`."""

    name: str = Field(description="The stage's name in the report. For evaluate, also the name of its row in the table.")
    row: str | None = Field(
        None,
        description="evaluate only: the row of the table, in place of `name`. Stages with one row are repeats with other seeds: the "
        "row is their mean, with intervals over users and seeds.",
    )
    do: Literal["prepare", "train", "embed", "evaluate"] = Field(description="The command.")
    target: str = Field(description="One of `runs`, a CONFIG (relative paths start at this file), or a run directory.")
    to: str | None = Field(None, description="embed only: the folder to write.")
    set: list[str] = Field(default_factory=list, description="Overrides, section.key=value.")


class PointConfig(Section):
    """A point of the report's curves: a metric of one row of the table against a number, with its interval."""

    line: str = Field(description="The line that it is on.")
    x: float = Field(description="Where it stands on the axis.")
    row: str = Field(description="The row of the table.")


class CurvesConfig(Section):
    """The report's curves: how the metrics change with a number, such as the negatives of a target."""

    axis: str = Field(description="What the number is.")
    points: list[PointConfig] = Field(min_length=1, description="The points, repeated over the matrix as stages are.")


class PublishedRow(Section):
    """A row of somebody else's table, for the same questions: values by metric, without intervals."""

    name: str = Field(description="Its name in the table.")
    source: str = Field(description="Where it is published, and what it was trained on.")
    metrics: dict[str, Annotated[float, Field(ge=0, le=1)]] = Field(description="Values by metric.")


class PipelineSection(Section):
    """The section `pipeline`."""

    title: str = Field(description="The report's title.")
    run_dir: str = Field(description="Folder for the report and the record of the stages.")
    stages: list[StageConfig] = Field(description="In the order in which they run.")
    pairs: list[Pair] = Field(default_factory=list, description="[better, worse]: paired differences to report.")
    curves: CurvesConfig | None = Field(None, description="A figure of the report.")
    published: list[PublishedRow] = Field(default_factory=list, description="Rows that others report, shown below ours.")
    metrics: list[str] = Field(default_factory=lambda: [*TABLE_METRICS], description="Columns.")


class PipelineConfig(Section):
    """A file for `rec-dist run`."""

    pipeline: PipelineSection
    runs: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Configurations of runs by name, each with its own `extends`. FILE:NAME names one on a command line.",
    )
    vars: dict[str, Value | dict[str, Value]] = Field(
        default_factory=dict,
        description="Values for ${vars.NAME}, or groups of them: one variable may choose a group, ${vars.${vars.size}.users}.",
    )
    matrix: dict[str, list[Value]] = Field(
        default_factory=dict,
        description="Values for ${matrix.NAME}. A stage, pair or point that uses some of them is repeated for every combination; with "
        "[] it is left out.",
    )
