"""A run that tests submit to the SLURM of slurm_cluster.py: its configuration, its run directory, and what its jobs left."""

import json
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
import yaml
from safetensors.numpy import load_file
from slurm_cluster import Slurm


class Run:
    """A configuration, its run directory, and its jobs."""

    def __init__(self, folder: Path, slurm: Slurm, make: Callable[..., dict[str, Any]]) -> None:
        self._slurm, self.folder = slurm, folder
        folder.mkdir(exist_ok=True)
        self.file, self.path = folder / "run.yaml", folder / "run"
        cluster = ("cluster.launcher=ray", "cluster.num_workers=2")
        submit = {"slurm": {"nodes": 2, "cpus_per_node": 1, "time": "20"}}
        self.file.write_text(yaml.safe_dump({**make(self.path, *cluster), "submit": submit}), encoding="utf-8")

    def submit(self, *overrides: str) -> tuple[int, str, str]:
        """(exit code, job number, standard error)."""
        command = [sys.executable, "-m", "rec_dist", "submit", str(self.file), "--to", "slurm", *overrides]
        environment = {**self._slurm.environment, "PYTHONPATH": os.pathsep.join(sys.path)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        number = done.stderr.partition("submitted batch job ")[2].partition(";")[0]
        return done.returncode, number, done.stderr

    def rows(self, event: str) -> list[dict[str, Any]]:
        file = self.path / "metrics.jsonl"
        rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.is_file() else []
        return [row for row in rows if row["event"] == event]

    def addresses(self, number: str) -> set[str]:
        """The addresses of the nodes that joined the job's Ray, from the log of its head."""
        log = self.folder / "run-slurm" / number / "attempt-0" / "ray-0" / "gcs_server.out"
        return set(re.findall(r"Registering new node.* node_address=(\S+)", log.read_text(encoding="utf-8")))

    def output(self) -> str:
        return "".join(file.read_text(encoding="utf-8") for file in self.path.with_name("run-slurm").glob("*.out"))

    def nothing_is_left(self, number: str) -> bool:
        """Whether no folder of the job is left, and no process but slurmd on the nodes.

        Ray's processes change their names, so every process counts.
        """
        return (
            not list(Path("/tmp").glob(f"rd{number}.*")) and not list(Path("/tmp").glob(".rd*")) and not self._slurm.strangers()
        )

    def differs_from(self, other: "Run") -> list[str]:
        """The parameters of its model that differ from the other run's in any bit."""
        ours, theirs = (load_file(next((run.path / "model").glob("*.safetensors"))) for run in (self, other))
        assert ours.keys() == theirs.keys()
        return [name for name in ours if ours[name].tobytes() != theirs[name].tobytes()]

    def raylets(self, number: str) -> list[psutil.Process]:
        """The addresses of a job, one a node."""
        found = psutil.process_iter(["name", "cmdline"])
        return [
            process
            for process in found
            if process.info["name"] == "raylet" and any(f"/tmp/rd{number}." in word for word in process.info["cmdline"])
        ]
