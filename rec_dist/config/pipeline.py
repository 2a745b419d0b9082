"""A file for `rec-dist run`: its stages, expanded over the matrix, with the words of each stage's command."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException
from pydantic import Field

from rec_dist.config.compose import MATRIX, PIPELINE, RUNS, VARS, load_unresolved, locate, sections
from rec_dist.config.load import validate
from rec_dist.config.references import Marks
from rec_dist.config.schema import RunConfig
from rec_dist.config.section import Section
from rec_dist.errors import UserError

Pair = Annotated[list[str], Field(min_length=2, max_length=2)]
_AXIS = re.compile(r"\$\{" + MATRIX + r"\.([^.}]+)")


class StageConfig(Section):
    """One stage: `rec-dist DO TARGET [TO] SET...`."""

    name: str = Field(description="The stage's name in the report. For evaluate, also the name of its row in the table.")
    do: Literal["prepare", "train", "embed", "evaluate"] = Field(description="The command.")
    target: str = Field(description="One of `runs`, a CONFIG (relative paths start at this file), or a run directory.")
    to: str | None = Field(None, description="embed only: the folder to write.")
    set: list[str] = Field(default_factory=list, description="Overrides, section.key=value.")


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
    published: list[PublishedRow] = Field(default_factory=list, description="Rows that others report, shown below ours.")
    metrics: list[str] = Field(default_factory=lambda: ["hr@1", "hr@5", "ndcg@5", "ndcg@10", "mrr"], description="Columns.")


class PipelineConfig(Section):
    """A file for `rec-dist run`."""

    pipeline: PipelineSection
    runs: dict[str, dict[str, Any]] = Field(
        default_factory=dict,
        description="Configurations of runs by name, each with its own `extends`. FILE:NAME names one on a command line.",
    )
    vars: dict[str, str | int | float] = Field(default_factory=dict, description="Values for ${vars.NAME}.")
    matrix: dict[str, list[str | int | float]] = Field(
        default_factory=dict,
        description="Values for ${matrix.NAME}. A stage or pair that uses some of them is repeated for every combination; with [] it "
        "is left out.",
    )


@dataclass(frozen=True)
class Stage:
    """A stage as it runs. target: a CONFIG as a command takes it (is_config), or a run directory."""

    name: str
    do: str
    target: str
    is_config: bool
    to: str | None
    set: tuple[str, ...]

    @property
    def words(self) -> list[str]:
        """What stands behind `rec-dist` in the command."""
        return [self.do, self.target, *([self.to] if self.to is not None else []), *self.set]


@dataclass(frozen=True)
class Pipeline:
    """A pipeline as it runs."""

    title: str
    run_dir: str
    stages: tuple[Stage, ...]
    pairs: tuple[list[str], ...]
    metrics: tuple[str, ...]
    published: tuple[PublishedRow, ...] = ()


def load_pipeline(path: Path, overrides: Sequence[str] = ()) -> Pipeline:
    """The pipeline in a file. Overrides of `vars` and of `runs.NAME` reach the commands of the stages, too.

    Raises UserError that names every fault, or says that the file is the configuration of one run.
    """
    if PIPELINE not in (own := sections(path)) and own & set(RunConfig.model_fields):
        raise UserError(
            f"{path} is the configuration of one run, which `rec-dist train` and `rec-dist evaluate` take; this command takes a "
            f"pipeline of stages: a file with the section `{PIPELINE}`, such as the recipe quickstart"
        )
    config = load_unresolved(path, overrides)
    where = str(path)
    value = _expanded(config, where)
    _keep_references(config, value, where)
    valid = validate(value, PipelineConfig, where)
    section = valid.pipeline
    stages = tuple(_stage(stage, path, set(valid.runs), overrides) for stage in section.stages)
    _check(section, stages, path, unused=set(valid.matrix) - set(_AXIS.findall(_text(config.get(PIPELINE)))))
    return Pipeline(
        section.title, section.run_dir, stages, tuple(section.pairs), tuple(section.metrics), tuple(section.published)
    )


def _expanded(config: DictConfig, where: str) -> dict[str, Any]:
    """The file as a mapping: stages and pairs repeated over the matrix, interpolations resolved but those of `runs`."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    scope = {str(key): entry for key, entry in plain.items() if key != RUNS}
    pipeline = scope.get(PIPELINE)
    try:
        if isinstance(pipeline, dict):
            matrix = scope.get(MATRIX) if isinstance(scope.get(MATRIX), dict) else {}
            lists = {key: pipeline.pop(key) for key in ("stages", "pairs") if isinstance(pipeline.get(key), list)}
            for key, entries in lists.items():
                pipeline[key] = [each for entry in entries for each in _repeated(entry, matrix, scope)]
        value = OmegaConf.to_container(OmegaConf.create(scope), resolve=True)
    except OmegaConfBaseException as fault:
        raise UserError(f"{where}: {str(fault).splitlines()[0]}") from fault
    assert isinstance(value, dict)
    return {**value, RUNS: plain.get(RUNS) or {}}


def _keep_references(config: DictConfig, value: dict[str, Any], where: str) -> None:
    """Puts ${oc.env:NAME} back into the overrides of stages: they become a command line, which others on the machine can read."""
    marks = Marks()
    marked = OmegaConf.create(marks.put(OmegaConf.to_container(config)))
    if not marks:
        return
    both = [entry.get(PIPELINE) for entry in (value, _expanded(marked, where))]
    stages = [part.get("stages") if isinstance(part, dict) else None for part in both]
    for stage, own in zip(*(part if isinstance(part, list) else [] for part in stages), strict=True):
        if isinstance(stage, dict) and isinstance(own.get("set"), list):
            stage["set"] = marks.take(own["set"])


def _repeated(entry: Any, matrix: Any, scope: dict[str, Any]) -> list[Any]:
    """`entry` for every combination of the matrix's values that it uses, in the order of the file."""
    used = set(_AXIS.findall(_text(entry)))
    axes = [axis for axis in matrix if axis in used and isinstance(matrix[axis], list)]
    found: list[Any] = []
    for values in itertools.product(*(matrix[axis] for axis in axes)):
        chosen = {**matrix, **dict(zip(axes, values, strict=True))}
        config = OmegaConf.create({**scope, MATRIX: chosen, "entry": [entry]})
        found += OmegaConf.to_container(config["entry"], resolve=True)  # type: ignore[arg-type]  # a list in, a list out
    return found


def _text(value: Any) -> str:
    return json.dumps(OmegaConf.to_container(value) if OmegaConf.is_config(value) else value)


def _stage(stage: StageConfig, path: Path, runs: set[str], overrides: Sequence[str]) -> Stage:
    beside, config = path.parent / stage.target, stage.target
    if stage.target in runs:
        config = f"{path}:{stage.target}"
        own = f"{RUNS}.{stage.target}."
        passed = [word.removeprefix(own) for word in overrides if word.startswith((own, f"{VARS}."))]
    elif beside.is_file():
        config, passed = str(beside), []
    else:
        file, _ = locate(Path(stage.target))
        return Stage(stage.name, stage.do, stage.target, file.is_file(), stage.to, tuple(stage.set))
    return Stage(stage.name, stage.do, config, True, stage.to, (*stage.set, *passed))


def _check(config: PipelineSection, stages: Sequence[Stage], path: Path, *, unused: set[str]) -> None:
    names = [stage.name for stage in stages]
    rows = {stage.name for stage in stages if stage.do == "evaluate"}
    faults = [f"pipeline.stages has the name {name} twice" for name in sorted({n for n in names if names.count(n) > 1})]
    faults += [f"matrix.{axis} is used by no stage and no pair" for axis in sorted(unused)]
    faults += [
        f"pipeline.pairs names {name}, which is no evaluate stage" for pair in config.pairs for name in pair if name not in rows
    ]
    for stage in stages:
        if not stage.is_config and (stage.do in ("prepare", "train") or stage.target.endswith((".yaml", ".yml"))):
            missing = f"not in `{RUNS}`, not beside {path.name} and no recipe"
            faults.append(f"pipeline.stages: {stage.name} names {stage.target}, which is {missing}")
        if (stage.do == "embed") != (stage.to is not None):
            what = "no key `to`, which embed needs" if stage.do == "embed" else "a key `to`, which is for embed alone"
            faults.append(f"pipeline.stages: {stage.name} has {what}")
    if not rows:
        faults.append("pipeline.stages has no evaluate stage, so there is nothing to compare")
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")
