"""A run as it is sent to a cluster: its command, and its configuration with every path on storage that all nodes see.

What is sent is the resolved configuration without the sections `submit` and `plan`, so a later edit of the file changes no job
that waits in a queue, and the run directory holds the same configuration wherever the run goes on.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

from rec_dist.config.delrec import RANDOM_TEACHER
from rec_dist.config.load import to_plain_yaml
from rec_dist.config.paths import PATHS, PATHS_OR_NAMES, TASK_PATHS
from rec_dist.config.schema import RunConfig
from rec_dist.config.submit import SubmitConfig
from rec_dist.runtime.errors import UserError
from rec_dist.runtime.files import is_remote

CONFIG_NAME = "config.yaml"
_MARGIN_SECONDS = 30


@dataclass(frozen=True)
class Job:
    """name: of letters, digits and dashes. config: what the run reads, as text and validated. submit: how it is sent there."""

    name: str
    config: RunConfig
    config_text: str
    submit: SubmitConfig

    @property
    def run_dir(self) -> str:
        """The run directory, absolute on the cluster."""
        return self.config.train.run_dir

    @property
    def grace_seconds(self) -> int:
        """From the scheduler's request to stop until it kills: what the run takes for itself, and time to tear down."""
        return math.ceil(self.config.checkpoint.grace_seconds) + _MARGIN_SECONDS

    def words(self, config_path: str) -> list[str]:
        """The command line, given where the configuration lies there."""
        return ["python", "-m", "rec_dist", self.submit.command, config_path]


def build_job(config: RunConfig, *, local_paths: bool) -> Job:
    """The job of a configuration.

    local_paths: the cluster sees this machine's folders, so that a relative path without submit.storage is one from here.
    Raises UserError for a path that means nothing on the cluster.
    """
    storage = config.submit.storage
    if storage is None and local_paths:
        storage = str(Path.cwd())
    if storage is not None and not storage.startswith("/"):
        raise UserError(f"submit.storage ({storage}) is not absolute; give the folder that all nodes see, such as /shared")
    value = config.model_dump(mode="json", exclude_unset=True)
    for section in ("submit", "plan"):
        value.pop(section, None)
    for section, key in (*PATHS, *PATHS_OR_NAMES):
        path = value.get(section, {}).get(key)
        if path is not None and not ((section, key) in PATHS_OR_NAMES and _is_name(path)):
            value[section][key] = _place(path, f"{section}.{key}", storage)
    for section, key in TASK_PATHS:
        path = value.get("task", {}).get(section, {}).get(key)
        if path not in (None, RANDOM_TEACHER):
            value["task"][section][key] = _place(path, f"task.{section}.{key}", storage)
    name = config.submit.name or f"rec-dist-{PurePosixPath(value['train']['run_dir']).name}"
    return Job(_plain(name), RunConfig.model_validate(value), to_plain_yaml(value), config.submit)


def _is_name(path: str) -> bool:
    """A known data set or model: one word, which no file here bears."""
    return "/" not in path and not path.startswith("~") and not Path(path).exists()


def _place(path: str, key: str, storage: str | None) -> str:
    if path.startswith("~"):
        raise UserError(f"{key} ({path}) names a home folder; give an absolute path on storage that all nodes see")
    if path.startswith("/") or is_remote(path):
        return path
    if storage is None:
        raise UserError(f"{key} ({path}) is relative; make it absolute, or set submit.storage to the folder that all nodes see")
    return str(PurePosixPath(storage) / path)


def _plain(name: str) -> str:
    """What Kubernetes, Ray and SLURM take for a name: at most 47 letters, digits and dashes (KubeRay adds to it)."""
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[:47].strip("-")
    if not plain:
        raise UserError(f"submit.name ({name}) has neither a letter nor a digit; choose another")
    return plain
