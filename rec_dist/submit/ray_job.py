"""A run as a job of a running Ray cluster: submit, follow and stop it. Only this file imports Ray's job client, and only on use.

`ray job submit` exits with 0 for a stopped job and with 1 for every failure; we return the driver's own exit code. Ray keeps no
exit code of a stopped job, so the entrypoint writes it as the last line of the log.
"""

import asyncio
import logging
import os
import re
import shlex
import shutil
import tempfile
import time
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from rec_dist.config.submit import RayJobConfig
from rec_dist.errors import UserError
from rec_dist.runtime.limits import within
from rec_dist.submit.job import CONFIG_NAME, Job

logger = logging.getLogger(__name__)

EXIT_FAILED, EXIT_STOPPED, EXIT_DETACHED = 1, 75, 130  # 130: as shells report Ctrl-C
_PACKAGES = ("rec_dist", "rec_dist_kernels")
_LAST_LINE = re.compile(r"^rec-dist: exit code (\d+)$", re.MULTILINE)
_POLL_SECONDS = 1.0
_QUIET_SECONDS = 60.0  # without output of the job, its state is asked for: the connection may be dead


def request_of(job: Job) -> dict[str, Any]:
    """The request to the job server, without the files. Only the time in submission_id differs between two calls."""
    submit = job.submit
    words = shlex.join(job.words(CONFIG_NAME))
    env = job.written_env(lambda name: f"set {name} on the nodes of the cluster, since its dashboard shows every request")
    return {
        "submission_id": submit.ray.submission_id or job.stamped_name(),
        # The shell gets SIGTERM too; it stays alive to report how the run ended.
        "entrypoint": f'trap : TERM INT; {words}; code=$?; echo "rec-dist: exit code $code"; exit $code',
        "runtime_env": {
            "excludes": submit.ray.excludes,
            # By default Ray kills a stopped job after 3 s, before it can finish a step and a checkpoint.
            "env_vars": {**env, "RAY_JOB_STOP_WAIT_TIME_S": str(job.grace_seconds)},
        },
        "metadata": {"run_dir": job.run_dir},
    }


def parts_of(ray: RayJobConfig) -> list[str]:
    """What the job takes along beside the configuration. Raises UserError if it does not exist."""
    if (ray.wheel is not None) != (ray.ship == "wheel"):
        raise UserError("submit.ray.wheel and submit.ray.ship=wheel go together: set both or none")
    if ray.wheel is not None:
        if not zipfile.is_zipfile(ray.wheel):
            raise UserError(f"submit.ray.wheel ({ray.wheel}) is not a wheel; make one with `pip wheel --no-deps .`")
        return [str(Path(ray.wheel).absolute())]
    return [str(_package(name)) for name in _PACKAGES] if ray.ship == "source" else []


def _package(name: str) -> Path:
    import importlib.util

    spec = importlib.util.find_spec(name)
    assert spec is not None
    assert spec.origin is not None
    return Path(spec.origin).parent


def stage(job: Job, folder: Path) -> None:
    """Fills the job's working directory: the configuration, and what it takes along."""
    (folder / CONFIG_NAME).write_text(job.config_text, encoding="utf-8")
    for part in map(Path, parts_of(job.submit.ray)):
        if part.is_dir():
            shutil.copytree(part, folder / part.name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            with zipfile.ZipFile(part) as wheel:
                wheel.extractall(folder)


def send(job: Job) -> int:
    """Submits the job, shows its output until it ends, and returns its driver's exit code."""
    request = request_of(job)
    client = _client(address_of(job.submit.ray), job.config.cluster.hang_seconds)
    with tempfile.TemporaryDirectory(prefix="rec-dist-job-") as folder:
        stage(job, Path(folder))
        environment = {**request.pop("runtime_env"), "working_dir": folder}
        with _asking("the job server refused the job"):
            submission_id = client.ask(client.server.submit_job, runtime_env=environment, **request)
    logger.info(f"submitted {submission_id}")
    return _follow(client, submission_id)


def follow(submission_id: str, ray: RayJobConfig | None, hang_seconds: float) -> int:
    """Shows a job's output from its start until it ends; returns its driver's exit code. hang_seconds: for each answer."""
    return _follow(_client(address_of(ray), hang_seconds), submission_id)


def stop(submission_id: str, ray: RayJobConfig | None, hang_seconds: float) -> int:
    """Asks a job to save and stop, and waits for it. Returns 75 if it saved or had finished, 1 if it was killed before.

    hang_seconds: for each answer of the job server.
    """
    client = _client(address_of(ray), hang_seconds)
    _details(client, submission_id)
    with _asking(f"{submission_id} cannot be stopped"):
        client.ask(client.server.stop_job, submission_id)
    logger.info(f"asked {submission_id} to stop; waiting for its checkpoint")
    return _follow(client, submission_id)


def address_of(ray: RayJobConfig | None) -> str | None:
    """The dashboard that will be used, None if nothing names one. Raises UserError for two names, or one that is no URL."""
    given, known = ray.address if ray is not None else None, os.environ.get("RAY_API_SERVER_ADDRESS") or None
    for key, address in (("submit.ray.address", given), ("RAY_API_SERVER_ADDRESS", known)):
        if address is not None and not re.fullmatch(r"https?://[^\s/]\S*", address):
            raise UserError(
                f"{key} ({address}) is not the address of a dashboard; start it with http:// or https://, as in http://HEAD:8265"
            )
    if given is not None and known is not None and known != given:
        raise UserError(
            f"submit.ray.address ({given}) and RAY_API_SERVER_ADDRESS ({known}) name different clusters; unset one of them"
        )
    return given or known


@dataclass(frozen=True)
class _Client:
    """Ray's job client, which itself waits for an answer for ever. hang_seconds: how long ask() waits; 0: for ever."""

    server: Any
    hang_seconds: float

    def ask(self, call: Callable[..., Any], *arguments: Any, **keywords: Any) -> Any:
        """What a method of `server` returns. Raises TimeoutError."""
        return within(self.hang_seconds, partial(call, *arguments, **keywords))


def _client(address: str | None, hang_seconds: float) -> _Client:
    from ray.job_submission import JobSubmissionClient

    for name in ("ray.dashboard.modules.job.sdk", "ray.dashboard.modules.dashboard_sdk", "ray._private.runtime_env.packaging"):
        logging.getLogger(name).setLevel(logging.WARNING)  # the user need not see uploads and closed connections
    if address is None:
        raise UserError(
            "no cluster is named; set RAY_API_SERVER_ADDRESS or submit.ray.address to its dashboard, such as http://HEAD:8265"
        )
    os.environ["RAY_API_SERVER_ADDRESS"] = address  # otherwise Ray prefers RAY_ADDRESS, which is not a dashboard
    with _asking(f"no job server answers at {address}"):
        return _Client(within(hang_seconds, partial(JobSubmissionClient, address)), hang_seconds)


@contextmanager
def _asking(what: str) -> Iterator[None]:
    """Turns whatever Ray's client raises (its own errors, those of requests, JSON or the system) into UserError."""
    try:
        yield
    except UserError:
        raise
    except Exception as fault:
        raise UserError(f"{what}: {_last_line(fault)}") from fault


def _details(client: _Client, submission_id: str) -> Any:
    with _asking(
        f"the job server does not answer (the job continues; return to it with rec-dist submit --follow {submission_id})"
    ):
        try:
            return client.ask(client.server.get_job_info, submission_id)
        except RuntimeError as fault:
            raise UserError(f"there is no job {submission_id} on this cluster; `ray job list` shows its jobs") from fault


def _follow(client: _Client, submission_id: str) -> int:
    shown = 0
    try:
        while not (details := _details(client, submission_id)).status.is_terminal():
            shown = asyncio.run(_show(client.server, submission_id, shown))
            time.sleep(_POLL_SECONDS)
    except KeyboardInterrupt:
        back, end = f"rec-dist submit --follow {submission_id}", f"rec-dist submit --stop {submission_id}"
        logger.info(f"\ndetached; the job continues. Return to it: {back}   Stop it with a checkpoint: {end}")
        return EXIT_DETACHED
    with _asking(f"the output of {submission_id} cannot be fetched"):
        text = client.ask(client.server.get_job_logs, submission_id)
    print(text[shown:], end="", flush=True)
    code = exit_code(str(details.status), details.driver_exit_code, text)
    message = f": {details.message}" if details.driver_exit_code is None and details.message else ""
    logger.info(f"{submission_id} {details.status}{message}; exit code {code}")
    return code


async def _show(client: Any, submission_id: str, shown: int) -> int:
    """Prints new output after the first `shown` characters as it arrives. Returns how many have been printed."""
    position = 0
    texts = aiter(client.tail_job_logs(submission_id))
    try:
        while (text := await asyncio.wait_for(anext(texts, None), _QUIET_SECONDS)) is not None:
            new = text[max(shown - position, 0) :]
            position += len(text)
            print(new, end="", flush=True)
    except (RuntimeError, OSError):  # the connection broke or is quiet, or there is no output yet: the caller tries again
        pass
    return max(position, shown)


def exit_code(status: str, driver: int | None, output: str) -> int:
    """Our exit code for an ended job. driver: its exit code if Ray kept one. output: holds a stopped job's in its last line."""
    if status == "SUCCEEDED":
        return 0
    if status == "STOPPED":
        said = _LAST_LINE.findall(output)
        # A run that had already finished counts as stopped: submitted again, it finds nothing to do.
        return EXIT_STOPPED if said and int(said[-1]) in (0, EXIT_STOPPED) else EXIT_FAILED
    return driver if driver is not None and 0 < driver < 126 else EXIT_FAILED  # from 126: not found, or killed by a signal


def _last_line(fault: Exception) -> str:
    lines = [line for line in str(fault).splitlines() if line.strip()]
    return lines[-1] if lines else type(fault).__name__
