"""A run as a SLURM batch job: the script that starts one Ray node a machine, and `sbatch`.

The script is whole: options, settings, the configuration, and the same body for every job (slurm_job.sh beside this file). SLURM
keeps a copy of it, so neither a later edit nor another version here changes a job that waits.
"""

import logging
import os
import shlex
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from rec_dist.config.submit import SlurmConfig
from rec_dist.errors import UserError
from rec_dist.storage.files import write_text
from rec_dist.submit.allocation import Allocation, check_allocation
from rec_dist.submit.job import Job
from rec_dist.submit.slurm_time import seconds_of
from rec_dist.submit.sweep import overrides_of

logger = logging.getLogger(__name__)

_END_OF_CONFIG = "END_OF_CONFIG"
_EARLY_SECONDS = 60  # by so much SLURM may send its signal earlier than asked


def check(job: Job, elements: Sequence[Job]) -> None:
    """Raises UserError for what sbatch or the job would refuse, as far as the configuration tells."""
    settings = job.submit.slurm
    _check(job, settings)
    if any(option.startswith(("--gpus", "--gres", "-G")) for option in settings.options):
        return  # how many those are only SLURM knows
    asked = Allocation(
        settings.nodes, settings.gpus_per_node, "submit.slurm.nodes", "submit.slurm.gpus_per_node", driver_gpus=True
    )
    notes = dict.fromkeys(check_allocation(each, asked) for each in elements or [job])
    for note in filter(None, notes):
        logger.info(note)


def script_of(job: Job, elements: Sequence[Job]) -> str:
    """The whole batch script. elements: the jobs of a sweep, whose overrides stand in submit.slurm.sweep; empty without one."""
    settings = job.submit.slurm
    body = Path(__file__).with_name("slurm_job.sh").read_text(encoding="utf-8")
    lines = ["#!/bin/bash", *_options(job, settings), "", *_settings(job, settings, elements), "", body]
    return "\n".join(lines)


def log_dir_of(job: Job) -> Path:
    """Where the script, its output and Ray's logs go; absolute."""
    folder = job.submit.slurm.log_dir or f"{job.run_dir}-slurm"
    return Path(folder) if folder.startswith("/") else Path(job.submit.storage or Path.cwd()) / folder


def send(job: Job, elements: Sequence[Job]) -> int:
    """Submits the script; the job then runs without us."""
    folder = log_dir_of(job)
    path = folder / f"{job.name}.sbatch"
    write_text(path, script_of(job, elements))
    # The Python that runs here is the one that runs there, also when its virtual environment has not been activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": search},
        )
    except FileNotFoundError:
        raise UserError("sbatch is not installed here; run this on a login node of the cluster") from None
    if done.returncode:
        raise UserError(f"sbatch refused the job: {done.stderr.strip()}; the script is {path}")
    number = done.stdout.strip().partition(";")[0]
    logger.info(f"submitted batch job {number}; output: {folder}/{job.name}-{number}.out")
    logger.info(
        f"its state: squeue -j {number}   stop with a checkpoint: scancel --batch --signal=TERM {number}   end: scancel {number}"
    )
    return 0


def _check(job: Job, settings: SlurmConfig) -> None:
    if (settings.image is not None) != (settings.container != "none"):
        raise UserError("submit.slurm.container and submit.slurm.image go together: set both or none")
    if settings.sweep_at_once is not None and not settings.sweep:
        raise UserError("submit.slurm.sweep_at_once limits a sweep; set submit.slurm.sweep or leave it out")
    if settings.time is not None:
        _check_time(job, settings.time)
    values = {
        "log_dir": str(log_dir_of(job)),
        **{key: getattr(settings, key) for key in ("partition", "account", "memory_per_node")},
    }
    for key, value in values.items():
        if value is not None and (not value or any(sign.isspace() for sign in value)):
            fault = "has a space in it" if value else "is empty"
            raise UserError(f"submit.slurm.{key} ({value}) {fault}, which sbatch does not take; choose another")
    if any("\n" in option for option in settings.options):
        raise UserError("submit.slurm.options has a line break; give one option an entry")


def _check_time(job: Job, limit: str) -> None:
    """UserError: no time of SLURM's, or one in which a run is asked to stop as soon as it begins, and queued again, for ever."""
    total, least = seconds_of(limit), job.grace_seconds + _EARLY_SECONDS
    if job.saves_when_asked and 0 < total <= least:
        raise UserError(
            f"submit.slurm.time ({limit}) is {total} s, and up to {least} s before its end the run is asked to stop; raise it, "
            f"or lower checkpoint.grace_seconds ({job.config.checkpoint.grace_seconds:g})"
        )


def _options(job: Job, settings: SlurmConfig) -> Iterator[str]:
    number = "%A_%a" if settings.sweep else "%j"
    found = {
        "job-name": job.name,
        "output": f"{log_dir_of(job)}/{job.name}-{number}.out",
        "open-mode": "append",  # an attempt after a requeue goes on in the same file
        "nodes": settings.nodes,
        "ntasks-per-node": 1,
        "cpus-per-task": settings.cpus_per_node,
        "gpus-per-node": (settings.gpus_per_node or None) if job.needs_gpus else None,
        "mem": settings.memory_per_node,
        "time": settings.time,
        "partition": settings.partition,
        "account": settings.account,
        "signal": f"B:USR1@{job.grace_seconds}",
        "array": _array(settings),
    }
    options = [f"--{name}={value}" for name, value in found.items() if value is not None]
    options.append("--requeue" if settings.requeue else "--no-requeue")
    return (f"#SBATCH {option}" for option in [*options, *settings.options])


def _array(settings: SlurmConfig) -> str | None:
    if not settings.sweep:
        return None
    limit = f"%{settings.sweep_at_once}" if settings.sweep_at_once is not None else ""
    return f"0-{len(settings.sweep) - 1}{limit}"


def _settings(job: Job, settings: SlurmConfig, elements: Sequence[Job]) -> Iterator[str]:
    values = {
        "run_dir": _asked_there(job),
        "log_dir": str(log_dir_of(job)),
        "scratch": settings.scratch,
        "interface": settings.interface or "",
        "start_seconds": str(settings.start_seconds),
        "requeue": str(int(settings.requeue)),
    }
    yield from (f"{name}={shlex.quote(value)}" for name, value in values.items())
    yield from (f"export {name}={shlex.quote(value)}" for name, value in job.submit.env.items())
    step_options, inside = _container(job, settings)
    yield f"step_options=({_quoted(step_options)})"
    yield f"inside=({_quoted(inside)})"
    yield "# shellcheck disable=SC2317,SC2329 # called by the scripts that are written below"
    yield "setup() {"
    yield from (f"  {line}" for line in [*settings.setup, ":"])
    yield "}"
    run = job.submit.command == "evaluate"
    if run:  # what it works on is the run, not the configuration whose path the script puts behind the command
        yield "# shellcheck disable=SC2016 # expanded by the inner shell"
        yield "command=(bash -c 'shift; exec python -m rec_dist evaluate \"$@\"' evaluate)"
    else:
        yield f"command=({shlex.join(job.words('')[:-1])})"
    yield f"overrides=({shlex.join(job.evaluation) if run else ''})"
    if elements:
        yield 'case "$SLURM_ARRAY_TASK_ID" in'
        for index, (element, words) in enumerate(zip(elements, settings.sweep, strict=True)):
            overrides = element.evaluation if run else overrides_of(job, element, words)
            yield f"  {index}) run_dir={shlex.quote(_asked_there(element))} overrides=({shlex.join(overrides)}) ;;"
        yield "esac"
    end = _END_OF_CONFIG
    while end in job.config_text:
        end += "_"
    yield f"config=$(cat << '{end}'"
    yield job.config_text.rstrip("\n")
    yield end
    yield ")"


def _asked_there(job: Job) -> str:
    """The run directory in which the script asks for a stop; none where nobody would read it, and a later run would."""
    return job.run_dir if job.saves_when_asked else ""


def _quoted(words: Sequence[str]) -> str:
    """Words of an array, all in quotes: with commas in them shellcheck takes bare ones for a mistake."""
    return " ".join("'" + word.replace("'", "'\"'\"'") + "'" for word in words)


def _container(job: Job, settings: SlurmConfig) -> tuple[list[str], list[str]]:
    """(options of srun, words before the command). The folders of the run are mounted where they are."""
    if settings.image is None:
        return [], []
    storage = job.submit.storage or str(Path.cwd())
    mounts = [f"{storage}:{storage}", f"{settings.scratch}:{settings.scratch}", *settings.mounts]
    if not str(log_dir_of(job)).startswith(f"{storage.rstrip('/')}/"):
        mounts.append(f"{log_dir_of(job)}:{log_dir_of(job)}")
    if settings.container == "enroot":
        return [f"--container-image={settings.image}", f"--container-mounts={','.join(mounts)}"], []
    gpu = ["--nv"] if settings.gpus_per_node and job.needs_gpus else []
    return [], ["apptainer", "exec", *gpu, "--bind", ",".join(mounts), settings.image]
