"""A file for `rec-dist run`: its stages, expanded over the matrix, with the words of each stage's command."""

import itertools
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from rec_dist.config.compose import MATRIX, PIPELINE, RUNS, VARS, load_unresolved, locate, sections
from rec_dist.config.load import validate
from rec_dist.config.pipeline_schema import CurvesConfig, PipelineConfig, PipelineSection, PublishedRow, StageConfig
from rec_dist.config.references import Marks
from rec_dist.config.schema import RunConfig
from rec_dist.errors import UserError

_AXIS = re.compile(r"\$\{" + MATRIX + r"\.([^.}]+)")


@dataclass(frozen=True)
class Stage:
    """A stage as it runs. target: a CONFIG as a command takes it (is_config), or a run directory. row: that of the table."""

    name: str
    row: str
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
    curves: CurvesConfig | None = None

    @property
    def rows(self) -> dict[str, list[Stage]]:
        """The evaluations of each row of the table, one a repeat, in the order of the file."""
        found: dict[str, list[Stage]] = {}
        for stage in self.stages:
            if stage.do == "evaluate":
                found.setdefault(stage.row, []).append(stage)
        return found


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
    pipeline = Pipeline(
        section.title,
        section.run_dir,
        stages,
        tuple(section.pairs),
        tuple(section.metrics),
        tuple(section.published),
        section.curves,
    )
    _check(section, pipeline, path, unused=set(valid.matrix) - set(_AXIS.findall(_text(config.get(PIPELINE)))))
    return pipeline


def _expanded(config: DictConfig, where: str) -> dict[str, Any]:
    """The file as a mapping: stages, pairs and points repeated over the matrix, interpolations resolved but those of `runs`."""
    plain = OmegaConf.to_container(config)
    assert isinstance(plain, dict)
    scope = {str(key): entry for key, entry in plain.items() if key != RUNS}
    pipeline = scope.get(PIPELINE)
    try:
        if isinstance(pipeline, dict):
            matrix = scope.get(MATRIX) if isinstance(scope.get(MATRIX), dict) else {}
            curves = pipeline.get("curves")
            places = [(pipeline, "stages"), (pipeline, "pairs"), (curves if isinstance(curves, dict) else {}, "points")]
            lists = [(place, key, place.pop(key)) for place, key in places if isinstance(place.get(key), list)]
            for place, key, entries in lists:
                place[key] = [each for entry in entries for each in _repeated(entry, matrix, scope)]
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
        return Stage(stage.name, stage.row or stage.name, stage.do, stage.target, file.is_file(), stage.to, tuple(stage.set))
    return Stage(stage.name, stage.row or stage.name, stage.do, config, True, stage.to, (*stage.set, *passed))


def _check(config: PipelineSection, pipeline: Pipeline, path: Path, *, unused: set[str]) -> None:
    stages, rows = pipeline.stages, pipeline.rows
    names = [stage.name for stage in stages]
    faults = [f"pipeline.stages has the name {name} twice" for name in sorted({n for n in names if names.count(n) > 1})]
    faults += [f"matrix.{axis} is used by no stage and no pair" for axis in sorted(unused)]
    faults += [
        f"pipeline.pairs names {name}, which is no row of an evaluate stage"
        for pair in config.pairs
        for name in pair
        if name not in rows
    ]
    points = config.curves.points if config.curves is not None else []
    faults += [
        f"pipeline.curves names {each.row}, which is no row of an evaluate stage" for each in points if each.row not in rows
    ]
    faults += [
        f"pipeline.stages: {stage.name} has a key `row`, which is for evaluate alone"
        for stage in stages
        if stage.do != "evaluate" and stage.row != stage.name
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
