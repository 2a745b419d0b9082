"""A run as a SLURM batch job: the script that starts one Ray node a machine (launchers/slurm.sbatch.j2), and `sbatch`.

The script holds everything: options, settings and the configuration. SLURM keeps a copy of it, so neither a later edit nor
another version installed here changes a job that waits in the queue.
"""

import logging
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

from rec_dist.config.submit import SlurmConfig
from rec_dist.errors import UserError
from rec_dist.storage.files import make_folder, write_text
from rec_dist.submit.allocation import Allocation, check_allocation
from rec_dist.submit.job import Job
from rec_dist.submit.templates import render

logger = logging.getLogger(__name__)

_END_OF_CONFIG = "END_OF_CONFIG"
_EARLY_SECONDS = 60  # SLURM may send its signal this much earlier than requested
_WITH_DAYS = re.compile(r"(\d+)-(\d+)(?::(\d+))?(?::(\d+))?", re.ASCII)
_WITHOUT = re.compile(r"(?:(\d+):(?=\d+:))?(\d+)(?::(\d+))?", re.ASCII)  # one number is minutes, two are minutes and seconds


def check(job: Job) -> None:
    """Raises UserError for what sbatch or the job would reject, as far as the configuration shows it."""
    settings = job.submit.slurm
    _check(job, settings)
    if any(option.startswith(("--gpus", "--gres", "-G")) for option in settings.options):
        return  # only SLURM knows how many GPUs these options mean
    nodes, gpus = "submit.slurm.nodes", "submit.slurm.gpus_per_node"
    note = check_allocation(job, Allocation(settings.nodes, settings.gpus_per_node, nodes, gpus, driver_gpus=True))
    if note is not None:
        logger.info(note)


def script_of(job: Job) -> str:
    """The whole batch script."""
    settings = job.submit.slurm
    words = [shlex.quote(word) for word in job.words("")]
    if job.submit.command != "evaluate":  # `evaluate` takes the run, which has a configuration of its own
        words[-1] = '"$folder/config.yaml"'
    end = _END_OF_CONFIG
    while end in job.config_text:
        end += "_"
    values = {
        "name": job.name,
        "run_dir": job.run_dir if job.saves_when_asked else "",  # nobody else would read the request, and a later run would
        "log_dir": str(log_dir_of(job)),
        "slurm": settings,
        "gpus": settings.gpus_per_node if job.needs_gpus else 0,
        "grace_seconds": job.grace_seconds,
        "env": {variable: value for variable, value in job.submit.env.items() if variable not in job.passed_on},
        "passed_on": job.passed_on,
        "mounts": ",".join(_mounts(job, settings)),
        "command": " ".join(words),
        "config": job.config_text.rstrip("\n"),
        "end_of_config": end,
    }
    return render("slurm.sbatch.j2", settings.template, "submit.slurm.template", values)


def log_dir_of(job: Job) -> Path:
    """Where the script, its output and Ray's logs go; absolute."""
    folder = job.submit.slurm.log_dir or f"{job.run_dir}-slurm"
    return Path(folder) if folder.startswith("/") else Path(job.submit.storage or Path.cwd()) / folder


def send(job: Job) -> int:
    """Submits the script and returns 0; the job then runs on its own."""
    folder, limit = log_dir_of(job), job.config.cluster.hang_seconds
    path = folder / f"{job.name}.sbatch"
    make_folder(folder, "owner")  # the script holds submit.env
    write_text(path, script_of(job))
    # The job uses the Python that runs here, even if its virtual environment has not been activated.
    search = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    try:
        done = subprocess.run(
            ["sbatch", "--parsable", str(path)],
            capture_output=True,
            text=True,
            check=False,
            env={**os.environ, "PATH": search},
            stdin=subprocess.DEVNULL,
            timeout=limit or None,
        )
    except subprocess.TimeoutExpired:
        raise UserError(
            f"sbatch did not answer within {limit:g} s (cluster.hang_seconds), and may have queued the job: look with "
            f"`squeue --me` before you submit again; the script is {path}"
        ) from None
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


def seconds_of(limit: str) -> int:
    """submit.slurm.time in seconds; 0 means no limit. Raises UserError for text that sbatch would not take (its manual, --time).

    >>> [seconds_of(limit) for limit in ("45", "45:30", "1:02:03", "2-3", "2-3:04", "2-03:04:05")]
    [2700, 2730, 3723, 183600, 183840, 183845]
    """
    if found := _WITH_DAYS.fullmatch(limit):
        days, hours, minutes, seconds = (int(part or 0) for part in found.groups())
    elif found := _WITHOUT.fullmatch(limit):
        days, (hours, minutes, seconds) = 0, (int(part or 0) for part in found.groups())
    else:
        raise UserError(
            f"submit.slurm.time ({limit}) is not a SLURM time: write MINUTES, M:S, H:M:S, DAYS-HOURS, D-H:M or D-H:M:S, such as "
            "1-00:00:00"
        )
    return ((days * 24 + hours) * 60 + minutes) * 60 + seconds


def _check(job: Job, settings: SlurmConfig) -> None:
    if (settings.image is not None) != (settings.container != "none"):
        raise UserError("submit.slurm.container and submit.slurm.image go together: set both or none")
    if settings.time is not None:
        _check_time(job, settings.time)
    values = {
        "log_dir": str(log_dir_of(job)),
        **{key: getattr(settings, key) for key in ("partition", "account", "memory_per_node")},
    }
    for key, value in values.items():
        if value is not None and (not value or any(sign.isspace() for sign in value)):
            fault = "contains a space" if value else "is empty"
            raise UserError(f"submit.slurm.{key} ({value}) {fault}, which sbatch does not take; choose another")
    if any("\n" in option for option in settings.options):
        raise UserError("submit.slurm.options contains a line break; give one option an entry")


def _check_time(job: Job, limit: str) -> None:
    """Raises UserError for a limit so short that the run would be asked to stop at once, and queued again, for ever."""
    total, least = seconds_of(limit), job.grace_seconds + _EARLY_SECONDS
    if job.saves_when_asked and 0 < total <= least:
        raise UserError(
            f"submit.slurm.time ({limit}) is {total} s, and the run is asked to stop up to {least} s before its end; raise it, "
            f"or lower checkpoint.grace_seconds ({job.config.checkpoint.grace_seconds:g})"
        )


def _mounts(job: Job, settings: SlurmConfig) -> list[str]:
    """HOST:INSIDE of each folder that a container needs; the run's own have the same path inside."""
    storage, log_dir = job.submit.storage or str(Path.cwd()), str(log_dir_of(job))
    mounts = [f"{storage}:{storage}", f"{settings.scratch}:{settings.scratch}", *settings.mounts]
    return mounts if log_dir.startswith(f"{storage.rstrip('/')}/") else [*mounts, f"{log_dir}:{log_dir}"]
