"""A run as it is sent to a cluster: its command, and its configuration with every path on storage that all nodes see.

The job carries the resolved configuration without the sections `submit` and `plan`. A later edit of the file therefore changes no
job that waits in a queue, and the run directory holds the same configuration wherever the run resumes.
"""

import json
import math
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from rec_dist.config.paths import PATHS, PATHS_OR_NAMES, check_path, paths_of, set_task_path, task_paths
from rec_dist.config.references import as_yaml, rebuilt
from rec_dist.config.schema import RunConfig
from rec_dist.config.submit import SubmitConfig
from rec_dist.config.yaml_text import to_word
from rec_dist.errors import UserError
from rec_dist.models.hub import is_hub_id
from rec_dist.storage.uri import is_remote

CONFIG_NAME = "config.yaml"
_PYTHON = ("python", "-P", "-m", "rec_dist")  # -P: a module in the folder where the job starts is not imported
_MARGIN_SECONDS = 30
_NAME_LENGTH = 31  # KubeRay takes 47, because it appends to the name; the time takes 16 of them
_REFERENCE = re.compile(r"\$\{\s*oc\.env\s*:\s*([A-Za-z_][A-Za-z0-9_]*)\s*\}", re.ASCII)
_VARIABLE = re.compile(r"[A-Za-z_][A-Za-z0-9_]*", re.ASCII)


@dataclass(frozen=True)
class Job:
    """name: letters, digits and dashes. config: what the run reads, validated and as text. submit: how the run is sent."""

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
        """From the scheduler's request to stop until it kills the job: the run's own grace and time to tear down."""
        return math.ceil(self.config.checkpoint.grace_seconds) + _MARGIN_SECONDS

    @property
    def needs_gpus(self) -> bool:
        """Whether the command uses GPUs."""
        return self.submit.command != "prepare"

    @property
    def saves_when_asked(self) -> bool:
        """Whether the command saves a checkpoint when it is asked to stop, and resumes from it."""
        return self.submit.command == "train"

    @property
    def passed_on(self) -> dict[str, str]:
        """Variables of submit.env that are not written down: variable -> the variable here that holds its value.

        Raises UserError for one that is more than ${oc.env:NAME}.
        """
        found = {}
        for key, text in self.config.from_environment.items():
            if key[:2] == ("submit", "env"):
                match = _REFERENCE.fullmatch(text)
                if match is None:
                    raise UserError(f"submit.env.{key[2]} ({text}) holds more than a variable; give ${{oc.env:NAME}} alone")
                found[key[2]] = match[1]
        return found

    def written_env(self, way_out: Callable[[str], str]) -> dict[str, str]:
        """submit.env for a request that others can read. Raises UserError with `way_out` for a variable that is not written down."""
        if passed := self.passed_on:
            variable = min(passed)
            raise UserError(
                f"submit.env.{variable} comes from the environment and would stand in the request; {way_out(variable)}"
            )
        return self.submit.env

    @property
    def paths(self) -> dict[str, str | None]:
        """Every path of the configuration by its key, as the cluster sees it."""
        return paths_of(self.config)

    def stamped_name(self) -> str:
        """The name with the time, because an ended job keeps its name and the run may be sent again."""
        return f"{self.name}-{time.strftime('%Y%m%d-%H%M%S')}"

    def words(self, config_path: str) -> list[str]:
        """The command line. config_path: where the configuration is on the cluster."""
        command = self.submit.command
        if command == "evaluate":
            return [*_PYTHON, command, *self.evaluation]
        return [*_PYTHON, command.removesuffix("_base"), config_path]

    @property
    def evaluation(self) -> list[str]:
        """The words after `evaluate`: the run, which has its own configuration, and our keys for how and where to measure."""
        sections = {"evaluate": self.config.evaluate, "cluster": self.config.cluster}
        values = [(name, key, value) for name, section in sections.items() for key, value in section.model_dump().items()]
        given = [("data", "path", self.config.data.path), *values]
        return [self.run_dir, *(self._word(name, key, value) for name, key, value in given)]

    @property
    def served(self) -> list[str]:
        """Changes to the configuration of the run that is served: our keys for where its data is and how it scores."""
        keys = [("data", "path"), ("evaluate", "ranker"), ("evaluate", "title_prior"), ("evaluate", "length_power")]
        keys += [("model", key) for key in ("dtype", "attention") if key in self.config.model.model_fields_set]
        return [self._word(section, key, getattr(getattr(self.config, section), key)) for section, key in keys]

    def _word(self, section: str, key: str, value: Any) -> str:
        """An override. Text from the environment is its reference, since others on the machine can read a command line."""
        text = None if (section, key) in PATHS else self.config.from_environment.get((section, key))
        return override(f"{section}.{key}", value) if text is None else f"{section}.{key}={json.dumps(text, ensure_ascii=False)}"


def override(key: str, value: Any) -> str:
    """`section.key=value`, as the command line takes it."""
    return f"{key}={to_word(value) if isinstance(value, str) else json.dumps(value)}"


def build_job(config: RunConfig, *, local_paths: bool) -> Job:
    """The job of a configuration.

    local_paths: the cluster sees this machine's folders, so that relative paths start here if submit.storage is not set.
    Raises UserError for a path or a variable that means nothing on the cluster.
    """
    storage = config.submit.storage
    if storage is None and local_paths:
        storage = str(Path.cwd())
    if storage is not None and not storage.startswith("/"):
        raise UserError(f"submit.storage ({storage}) is not absolute; give the folder that all nodes see, such as /shared")
    for variable in config.submit.env:
        if not _VARIABLE.fullmatch(variable):
            raise UserError(
                f"submit.env ({variable}) is not the name of a shell variable; use letters, digits and _, and start with no digit"
            )
    value = config.model_dump(mode="json", exclude_unset=True)
    for section in ("submit", "plan"):
        value.pop(section, None)
    for section, key in (*PATHS, *PATHS_OR_NAMES):
        path = value.get(section, {}).get(key)
        if path is not None and not ((section, key) in PATHS_OR_NAMES and _is_name(path, section)):
            value[section][key] = _place(path, f"{section}.{key}", storage)
    for section, key, path in task_paths(config):
        set_task_path(value, section, key, _place(path, f"task.{section}.{key}", storage))
    if config.submit.command == "evaluate" and config.evaluate.ranker != "model":
        raise UserError(
            f"evaluate.ranker ({config.evaluate.ranker}) needs no run; set submit.command=evaluate_base, or evaluate.ranker=model"
        )
    sent = rebuilt(config, value)
    return Job(_name_of(config.submit, value["train"]["run_dir"]), sent, as_yaml(sent, exclude_unset=True), config.submit)


def _is_name(path: str, section: str) -> bool:
    """Whether `path` is the name of a known data set or model, one word that no file here has, or the Hub id of a model.

    A folder that looks like a Hub id is written ./org/name.
    """
    if section == "model" and is_hub_id(path):
        return True
    return "/" not in path and not path.startswith("~") and not Path(path).exists()


def _place(path: str, key: str, storage: str | None) -> str:
    check_path(key, path)
    if path.startswith("~"):
        raise UserError(f"{key} ({path}) names a home folder; give an absolute path on storage that all nodes see")
    if path.startswith("/") or is_remote(path):
        return path
    if storage is None:
        raise UserError(f"{key} ({path}) is relative; make it absolute, or set submit.storage to the folder that all nodes see")
    return str(PurePosixPath(storage) / path)


def _name_of(submit: SubmitConfig, run_dir: str) -> str:
    """A name that Kubernetes, Ray and SLURM accept: letters, digits and dashes. All commands but train append their own."""
    name = submit.name or f"rec-dist-{PurePosixPath(run_dir).name}"
    command = "" if submit.command == "train" else f"-{submit.command.replace('_', '-')}"
    plain = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")[: _NAME_LENGTH - len(command)].strip("-")
    if not plain:
        raise UserError(f"submit.name ({name}) has neither a letter nor a digit; choose another")
    return plain + command
