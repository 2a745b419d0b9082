"""A pipeline: runs the stages of one file one after another, then writes the comparison and the report.

Each stage is a command in its own process (commands/stages.py). So it frees its memory, cannot change the next stage, and you
can repeat it by copying its line. A pipeline that was stopped goes on when you run it again, because every command keeps
finished work.
"""

import json
import logging
import shlex
import signal
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from rec_dist.commands.stages import stages_forked
from rec_dist.commands.target import base_results_dir
from rec_dist.config.load import load_config, load_saved
from rec_dist.config.paths import absolute, check_path
from rec_dist.config.pipeline import Pipeline, Stage, load_pipeline
from rec_dist.data.artifacts.embeddings import read_manifest
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.errors import StopRequested, UserError, one_line
from rec_dist.evaluation.measure import metric_names
from rec_dist.report.compare import compare
from rec_dist.report.text_table import text_table
from rec_dist.report.write import Report, StageSummary, read_run, write_report
from rec_dist.runtime.environment import without_secrets
from rec_dist.runtime.messages import say
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import write_json, write_text
from rec_dist.storage.outputs import check_output

logger = logging.getLogger(__name__)

EXIT_FAILED = 1
_STAGES_NAME = "stages.json"


@dataclass(frozen=True)
class StageRecord:
    """The time that a stage took when it did its work. A later run that finds it finished keeps this record."""

    name: str
    command: str
    seconds: float


def run_pipeline(path: Path, overrides: Sequence[str]) -> int:
    """Runs all stages, prints the table and writes report.html.

    Returns 0, or the exit code of the stage that failed or stopped.
    """
    config = load_pipeline(path, overrides)
    _check_metrics(config, path)
    _evaluated(config, path)
    check_path("pipeline.run_dir", config.run_dir)
    folder = absolute(config.run_dir)
    check_output(folder, "pipeline.run_dir", folder=True, may_exist=True)
    _refuse_others(folder)
    with RunDirectory(folder, key="pipeline.run_dir").locked():
        return _run_stages(config, path, overrides, folder)


def _refuse_others(folder: Path) -> None:
    """Raises UserError for a folder with files of something else: a run, or the user's own."""
    if folder.is_dir() and not (folder / _STAGES_NAME).is_file():
        files = sorted(entry.name for entry in folder.iterdir() if not entry.is_dir() and not entry.name.startswith("."))
        if files:
            raise UserError(
                f"pipeline.run_dir ({folder}) holds {files[0]} and no report of a pipeline; choose another folder, or remove it"
            )


def _run_stages(config: Pipeline, path: Path, overrides: Sequence[str], folder: Path) -> int:
    records = _Records(folder / _STAGES_NAME)
    began = time.perf_counter()
    with stages_forked(preload=not torch.cuda.is_available()) as stages:
        for number, stage in enumerate(config.stages, 1):
            command = f"rec-dist {shlex.join(without_secrets(stage.words))}"
            logger.info(f"\n[{number}/{len(config.stages)}] {stage.name}: {command}")
            started = time.perf_counter()
            code = stages.run(stage.words)
            seconds = time.perf_counter() - started
            if stages.stop_wanted and code == -signal.SIGTERM:  # most commands have nothing to save
                raise StopRequested(f"stopped in stage {stage.name}; run the same command again to go on from there")
            if code:
                logger.info(f"stage {stage.name} ended with exit code {code}; run the same command again to go on from there")
                return code if code > 0 else EXIT_FAILED  # negative: a signal ended it
            records.keep(StageRecord(stage.name, command, seconds))
            if stages.stop_wanted:  # which the stage met at its end
                raise StopRequested(f"stopped after stage {stage.name}; run the same command again to go on from there")
    _report(config, path, overrides, records, seconds=time.perf_counter() - began)
    return 0


def _check_metrics(config: Pipeline, path: Path) -> None:
    known = metric_names()
    faults = [
        f"pipeline.metrics names {metric}, which is not measured; choose of {', '.join(known)}"
        for metric in config.metrics
        if metric not in known
    ]
    if faults:
        raise UserError(f"{path}: {'; '.join(faults)}")


class _Records:
    """stages.json: the time of each stage when it did its work. Shorter repeats, which find it finished, do not count."""

    def __init__(self, path: Path) -> None:
        self._path = path
        try:
            rows: list[dict[str, Any]] = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
            self._rows = {row["name"]: StageRecord(**row) for row in rows}
        except (OSError, ValueError, TypeError, KeyError, RecursionError) as fault:
            raise UserError(
                f"{path} cannot be read ({one_line(fault)}); remove that file: finished stages are found finished, and only the times "
                "that they took are lost"
            ) from fault

    def keep(self, record: StageRecord) -> None:
        known = self._rows.get(record.name)
        if known is None or known.command != record.command or record.seconds > known.seconds:
            self._rows[record.name] = record
        write_json(self._path, [asdict(row) for row in self._rows.values()])

    def __getitem__(self, name: str) -> StageRecord:
        return self._rows[name]


def _results_dir(stage: Stage) -> Path:
    """The run directory, or folder of embeddings, that a stage writes to."""
    if stage.to is not None:
        return absolute(stage.to)
    if stage.is_config:
        config = load_config(Path(stage.target), stage.set)
        return base_results_dir(config) if stage.do == "evaluate" else absolute(config.train.run_dir)
    saved = absolute(stage.target) / "config.yaml"
    if saved.is_file():
        elsewhere = load_saved(saved, stage.set).evaluate.output_dir
    else:  # an earlier stage makes the run
        given = [word.partition("=")[2] for word in stage.set if word.startswith("evaluate.output_dir=")]
        elsewhere = given[-1] if given else None
    return absolute(elsewhere or stage.target)


def _evaluated(config: Pipeline, path: Path) -> dict[str, Path]:
    """The folder of each evaluation, by the name of its stage. Raises UserError if two are one, whose rows would be the same."""
    found = {stage.name: _results_dir(stage) for stage in config.stages if stage.do == "evaluate"}
    owners: dict[Path, str] = {}
    for name, folder in found.items():
        first = owners.setdefault(folder.resolve(), name)
        if first != name:
            raise UserError(
                f"{path}: pipeline.stages: {first} and {name} evaluate into one folder ({folder}), where the second replaces the "
                f"first; add evaluate.output_dir=FOLDER to `set` of {name}, or remove it"
            )
    return found


def _report(config: Pipeline, path: Path, overrides: Sequence[str], records: _Records, *, seconds: float) -> None:
    evaluated = _evaluated(config, path)
    of_rows = {row: [evaluated[stage.name] for stage in stages] for row, stages in config.rows.items()}
    compared = compare(of_rows, config.pairs, config.metrics)
    folder = absolute(config.run_dir)
    again = shlex.join(["rec-dist", "run", str(path), *without_secrets(overrides)])
    report = Report(
        title=config.title,
        summary=[compared.summary],
        rows=compared.rows,
        published=config.published,
        curves=config.curves,
        differences=compared.differences,
        shares=compared.shares,
        stages=[_stage_summary(stage, records) for stage in config.stages],
        runs=[read_run(folder, name) for name, folder in evaluated.items()],
        data_facts=_data_facts(evaluated),
        commands=[again, *(records[stage.name].command for stage in config.stages)],
        num_candidates=compared.num_candidates if isinstance(compared.num_candidates, int) else None,
    )
    write_report(folder / "report.html", report)
    table = text_table(compared.rows, [*compared.differences, *compared.shares], config.published)
    write_text(folder / "table.txt", table + "\n")
    say(table)
    logger.info(f"report: {folder / 'report.html'}; this run took {seconds / 60:.1f} minutes")


def _stage_summary(stage: Stage, records: _Records) -> StageSummary:
    record = records[stage.name]
    tokens = None
    folder = None if stage.do == "prepare" else _results_dir(stage)
    if stage.do == "embed" and folder is not None:
        tokens = (read_manifest(folder) or {}).get("tokens")
    elif folder is not None:
        rows = RunDirectory(folder).rows()
        events = ("step", "reference") if stage.do == "train" else ("evaluation",)
        tokens = sum(int(row.get("tokens", 0)) for row in rows if row.get("event") in events) or None
    return StageSummary(stage.name, record.command, record.seconds, tokens, str(folder or ""))


def _data_facts(evaluated: dict[str, Path]) -> dict[str, Any]:
    """Facts from the manifest of the data set behind the first row."""
    manifest = Manifest.load(RunDirectory(next(iter(evaluated.values()))).config()["data"]["path"])
    targets = {f"{name} users (targets)": f"{part.rows:,} ({part.targets:,})" for name, part in manifest.splits.items()}
    return {
        "source": manifest.source,
        "split": manifest.settings.get("split"),
        "fingerprint": manifest.fingerprint,
        **manifest.counts,
        "share of positives with the timestamp of the previous one": f"{manifest.tie_share:.1%}",
        **targets,
    }
