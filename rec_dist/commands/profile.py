"""`rec-dist profile`: runs the real configuration for a few steps, prints a table and compares it with an earlier profile.

Results go to a folder of their own; the run directory is neither read nor written. profile.json is written last.
"""

import json
import logging
import math
import textwrap
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

from rec_dist.commands.dtype import settle_dtype
from rec_dist.commands.progress import watching
from rec_dist.config.paths import absolute, pinned
from rec_dist.config.references import rebuilt
from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.errors import UserError
from rec_dist.launch.workers import launch
from rec_dist.methods.registry import build_task, check_workers_find, find_initial_weights
from rec_dist.profiling.phases import PHASES
from rec_dist.profiling.report import FORMAT, PROFILE_NAME
from rec_dist.profiling.session import profile_worker
from rec_dist.runtime import environment
from rec_dist.runtime.messages import say
from rec_dist.runtime.run_directory import RunDirectory
from rec_dist.storage.files import write_json
from rec_dist.storage.outputs import check_output
from rec_dist.training.worker import TrainJob

logger = logging.getLogger(__name__)

_MARK = ".profile"
_NAME_WIDTH, _TEXT_WIDTH = 18, 100


def profile(config: RunConfig, *, against: Path | None, tolerance: float) -> int:
    """Measures, writes profile.json and prints the table. Returns 0, or 1 if slower than `against` by more than `tolerance`.

    Also returns 1 if code was compiled after the warm-up, because then the numbers measure the compiler.
    Raises UserError before a worker starts.
    """
    if not math.isfinite(tolerance) or tolerance < 0:
        raise UserError(f"--tolerance ({tolerance}) must be 0 or more; it is a share: 0.05 allows 5 %")
    earlier = read_profile(against) if against is not None else None
    config = _shortened(pinned(config))
    run = RunDirectory(_output_dir(config), key="profile.output_dir")
    check_output(run.path, "profile.output_dir", folder=True, may_exist=True)
    _is_new(run)
    check_workers_find(config)
    initial = find_initial_weights(config)
    build_task(config, initial, "cpu")
    config, lines = settle_dtype(config)
    with _kept_for_profiles(run):
        with watching(run, hang_seconds=config.cluster.hang_seconds):
            for line in lines:
                run.log(line)
            job = TrainJob(config.model_dump(), str(run.path), initial)
            report = launch(profile_worker, job, config.cluster, run)
        hashes = {"data": Manifest.load(config.data.path).fingerprint, **initial.fingerprints()}
        report["environment"] = environment.describe(hashes=hashes)
        for old in [*run.path.glob("trace-rank-*.json"), *run.path.glob("memory-rank-*.pickle")]:
            if old.name not in report["files"]:
                old.unlink()
        write_json(run.path / PROFILE_NAME, report)
    say("\n".join([*table(report), f"written to {run.path / PROFILE_NAME}"]))
    problems = faults(report)
    if earlier is not None:
        for line in differing_settings(earlier, report):
            logger.info(line)
        lines, slower = compare(earlier, report, tolerance)
        say("\n".join(lines))
        problems += slower
    for problem in problems:
        logger.info(f"failed: {problem}")
    return int(bool(problems))


def _shortened(config: RunConfig) -> RunConfig:
    """The configuration with only the measured steps, so that a cached reference is computed for those alone."""
    settings, value = config.profile, config.model_dump()
    value["train"]["max_steps"] = settings.warmup_steps + settings.steps
    return rebuilt(config, value)


def _output_dir(config: RunConfig) -> Path:
    path = absolute(config.profile.output_dir or f"{config.train.run_dir}-profile")
    if path == absolute(config.train.run_dir):
        raise UserError(f"profile.output_dir ({path}) is train.run_dir, which a profile must not touch; choose another folder")
    return path


@contextmanager
def _kept_for_profiles(run: RunDirectory) -> Iterator[None]:
    """Locks the folder and marks it as a profile's. Removes a new folder again after a UserError inside."""
    new = _is_new(run)
    with run.locked():
        (run.path / _MARK).touch()
        try:
            yield
        except UserError:
            if new:
                run.take_back()
            raise


def _is_new(run: RunDirectory) -> bool:
    """Whether the folder holds no profile yet. Raises UserError if it holds anything else."""
    new = not (run.path / _MARK).is_file()
    if new and run.path.is_dir() and any(run.path.iterdir()):
        raise UserError(f"profile.output_dir ({run.path}) is not empty and holds no profile; choose another folder")
    return new


def read_profile(path: Path) -> dict[str, Any]:
    """Reads a profile.json. Raises UserError if it is not one."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if value["format"] != FORMAT:
            raise ValueError(f"its format is {value['format']} and this version writes {FORMAT}")
        numbers = float(value["real"]["tokens_per_second"]), float(value["real"]["step_seconds"]["p50"])
        if not all(0 < number < float("inf") for number in numbers):
            raise ValueError(f"tokens/s and p50 are {numbers}")
        if not isinstance(value["settings"], dict):
            raise TypeError("its settings are not an object")
    except (OSError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as fault:
        raise UserError(
            f"--against ({path}) is not a readable {PROFILE_NAME} ({fault!r}); give one that this version of the command wrote"
        ) from fault
    return dict(value)


def differing_settings(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """A warning for each setting that differs, because it may be what makes the difference."""
    names = sorted(old["settings"].keys() | new["settings"].keys())
    pairs = [(name, old["settings"].get(name), new["settings"].get(name)) for name in names]
    return [f"WARNING: {name} was {before} and is {after}" for name, before, after in pairs if before != after]


def compare(old: dict[str, Any], new: dict[str, Any], tolerance: float) -> tuple[list[str], list[str]]:
    """(a line for each of tokens/s and the median step, what is worse by more than the share `tolerance`)."""
    lines, slower = [], []
    before, after = float(old["real"]["tokens_per_second"]), float(new["real"]["tokens_per_second"])
    lines.append(f"tokens/s   {before:,.1f} -> {after:,.1f} ({after / before - 1:+.1%})")
    if after < before * (1 - tolerance):
        slower.append(f"tokens/s fell from {before:,.1f} to {after:,.1f}, by more than {tolerance:.1%}")
    before, after = float(old["real"]["step_seconds"]["p50"]), float(new["real"]["step_seconds"]["p50"])
    lines.append(f"step p50   {before:.4g} s -> {after:.4g} s ({after / before - 1:+.1%})")
    if after > before * (1 + tolerance):
        slower.append(f"the median step rose from {before:.4g} s to {after:.4g} s, by more than {tolerance:.1%}")
    return lines, slower


def faults(report: dict[str, Any]) -> list[str]:
    """What makes the measurement worthless."""
    count = report["recompilations_after_warmup"]
    return [f"{count} graphs were compiled after the warm-up; raise profile.warmup_steps"] if count else []


def table(report: dict[str, Any]) -> list[str]:
    """The report for a person, a line a fact."""
    real, synthetic, settings = report["real"], report["synthetic"], report["settings"]
    memory, ranks, compute = report["memory"], report["ranks"], report["compute"]
    peak, total, headroom = memory["peak_bytes"] / 1e9, memory["total_bytes"] / 1e9, memory["headroom_share"]
    behind = f"{ranks['lag_seconds']:.4g} s ({ranks['lag_share']:.1%} of a step) behind the fastest"
    rows: list[tuple[str, str]] = [
        ("what", f"{settings['workers']} x {settings['device']}, {settings['dtype']}, {real['steps']} steps after warm-up"),
        ("", f"{'real data':>16} {'random tokens':>16}"),
        *_side_by_side(real, synthetic),
        ("data costs", f"{report['data_cost']:+.1%} of tokens/s: random tokens against the same real steps once more"),
        ("padding", f"{report['padding_share']:.2%} of rows"),
        *_compute_rows(compute),
        ("collectives", f"{report['communication']['share_of_traced_step']:.1%} of the traced step, inside the phases above"),
        (
            "memory",
            f"peak {peak:.2f} of {total:.2f} GB, headroom {headroom:.0%}",
        ),
        ("", f"rank {memory['fullest_rank']}; {memory['basis']}"),
        ("slowest rank", f"{ranks['slowest_rank']}, {behind}"),
        ("compilations", f"{report['recompilations_after_warmup']} after warm-up"),
        ("files", ", ".join(report["files"]) or "none"),
    ]
    lines = [(name if not part else "", text) for name, value in rows for part, text in enumerate(_folded(value))]
    return [f"{name:<{_NAME_WIDTH}} {text}".rstrip() for name, text in lines]


def _folded(text: str) -> list[str]:
    return textwrap.wrap(text, _TEXT_WIDTH) if len(text) > _TEXT_WIDTH else [text]


def _side_by_side(real: dict[str, Any], synthetic: dict[str, Any]) -> list[tuple[str, str]]:
    both: Sequence[dict[str, Any]] = (real, synthetic)
    pair: Callable[[str, Callable[[dict[str, Any]], str]], tuple[str, str]]
    pair = lambda name, text: (name, " ".join(f"{text(side):>16}" for side in both))
    return [
        pair("step p50", lambda side: f"{side['step_seconds']['p50']:.4g} s"),
        pair("step p95", lambda side: f"{side['step_seconds']['p95']:.4g} s"),
        pair("tokens/s", lambda side: f"{side['tokens_per_second']:,.0f}"),
        pair("logical tokens/s", lambda side: f"{side['logical_tokens_per_second']:,.0f}"),
        pair("groups/s", lambda side: f"{side['groups_per_second']:,.1f}"),
        pair("data wait p50", lambda side: f"{side['data_wait_seconds']['p50']:.2g} s"),
        *(pair(f"  {phase}", partial(_share, phase)) for phase in (*PHASES, "other")),
    ]


def _share(phase: str, side: dict[str, Any]) -> str:
    return f"{side['shares'][phase]:.1%}"


def _compute_rows(compute: dict[str, Any]) -> list[tuple[str, str]]:
    peak = ("peak", f"{compute['peak_flops'] / 1e12:.4g} TFLOP/s a device ({compute['peak_source']})")
    if compute["mfu"] is None:
        return [peak, ("mfu", f"not counted: {compute['why']}")]
    weights = compute["weights"]
    counts = f"frozen {weights['frozen']:,}, training {weights['training']:,}, head {weights['head']:,} weights"
    return [
        peak,
        ("mfu", f"{compute['mfu']:.2%} ({compute['hfu']:.2%} with what is computed twice), on processed tokens"),
        ("", f"{counts}; {compute['formula']}"),
    ]
