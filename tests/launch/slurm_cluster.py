"""A real SLURM for tests: munged, slurmctld, and two slurmd in network namespaces with addresses of their own (namespaces.py).

A job's steps are children of their node's slurmd and so run in its namespace: they bind and look up at their own address. The
controller and whoever calls sbatch are outside, at the bridge. They share disk, memory, CPUs, users and the host's name, which
resolves to 127.0.0.1. Needs root, iproute2, and Debian's slurmctld, slurmd, slurm-client and munge, which `make test-launch`
installs.
"""

import os
import re
import secrets
import socket
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from namespaces import Network

TIMEOUT_SECONDS = 900.0  # a job takes a minute or two on two free cores, six times that under load
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scontrol", "scancel", "squeue")

_CONF = """
ClusterName=test
SlurmctldHost={host}({gateway})
SlurmctldPort={port}
SlurmUser=root
SlurmdUser=root
AuthType=auth/munge
AuthInfo=socket={folder}/munge.socket
CredType=cred/munge
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool-%n
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd-%n.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd-%n.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SwitchType=switch/none
MpiDefault=none
SelectType=select/cons_tres
SelectTypeParameters=CR_Core
SlurmdParameters=config_overrides
ReturnToService=1
KillWait=20
JobRequeue=1
JobAcctGatherType=jobacct_gather/none
NodeName=n1 NodeHostname={host} NodeAddr={n1} Port=6818 CPUs=2 RealMemory=8000
NodeName=n2 NodeHostname={host} NodeAddr={n2} Port=6818 CPUs=2 RealMemory=8000
PartitionName=main Nodes=n[1-2] Default=YES MaxTime=1:00:00 State=UP
"""


def wait_for(what: Callable[[], Any], why: str) -> Any:
    """Waits for the first true answer of `what` and returns it."""
    until = time.monotonic() + TIMEOUT_SECONDS
    while time.monotonic() < until:
        found = what()
        if found:
            return found
        time.sleep(0.5)
    raise TimeoutError(why)


def free_port() -> int:
    """A port that is free at every address."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


class Slurm:
    """Two nodes, n1 and n2, with two CPUs each. They can run two jobs of one CPU a node side by side."""

    def __init__(self, folder: Path, network: Network) -> None:
        self._folder, self.network, self._children = folder, network, list[subprocess.Popen[bytes]]()
        self.addresses = {f"n{host + 1}": network.address(host) for host in range(2)}
        (folder / "state").mkdir()
        key = folder / "munge.key"
        key.write_bytes(secrets.token_bytes(128))
        key.chmod(0o400)
        conf = folder / "slurm.conf"
        here = {"host": socket.gethostname(), "gateway": network.gateway, "port": free_port()}
        conf.write_text(_CONF.format(folder=folder, **here, **self.addresses), encoding="utf-8")
        self.environment = {**os.environ, "SLURM_CONF": str(conf)}

    def start(self) -> None:
        """Returns when both nodes are idle."""
        place = self._folder
        munge = [f"--{name}={place}/munge.{suffix}" for name, suffix in _MUNGE_FILES.items()]
        self._spawn("munged", "--foreground", "--force", *munge)
        wait_for((place / "munge.socket").exists, "munged listens")
        self._spawn("slurmctld", "-D", "-f", self.environment["SLURM_CONF"])
        for host, node in enumerate(self.addresses):
            command = ("slurmd", "-D", "-N", node, "-f", self.environment["SLURM_CONF"])
            output = self._folder / f"{node}.out"
            self._children.append(self.network.start(host, *command, environment=self.environment, output=output))
        wait_for(
            lambda: self.ask("sinfo", "--noheader", "--format=%T %D", check=False).strip() == "idle 2", "both nodes are idle"
        )

    def _spawn(self, *command: str) -> None:
        with (self._folder / f"{command[0]}-{len(self._children)}.out").open("wb") as out:
            self._children.append(subprocess.Popen(command, env=self.environment, stdout=out, stderr=out))

    def ask(self, *command: str, check: bool = True) -> str:
        """Standard output of a SLURM command."""
        return subprocess.run(command, env=self.environment, capture_output=True, text=True, check=check).stdout

    def job(self, number: str) -> dict[str, str]:
        """SLURM's record of a job: JobState, ExitCode, Restarts, ..."""
        return dict(re.findall(r"(\S+?)=(\S*)", self.ask("scontrol", "show", "job", number)))

    def wait_for_end(self, number: str, *, at_once: bool = True) -> dict[str, str]:
        """Waits until the job has ended and returns it.

        at_once: moves forward its start after a requeue, which SLURM delays by two minutes.
        """

        def ended() -> dict[str, str] | None:
            job = self.job(number)
            if at_once and job["JobState"] == "PENDING" and job["Reason"] == "BeginTime":
                self.ask("scontrol", "update", f"JobId={number}", "StartTime=now", check=False)
            return job if job["JobState"] in ("COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL") else None

        job = wait_for(ended, f"job {number} ends")
        assert isinstance(job, dict)
        return job

    def strangers(self) -> list[int]:
        """Processes on the nodes that do not belong to slurmd itself."""
        own = [child.pid for child in self._children]
        found = [number for host in range(len(self.addresses)) for number in self.network.processes(host)]
        return [number for number in found if number not in own]

    def stop(self) -> None:
        """Ends all jobs, then the daemons that were started here."""
        self.ask("scancel", "--user=root", check=False)
        wait_for(lambda: not self.ask("squeue", "--noheader", check=False).strip(), "all jobs are gone")
        for child in reversed(self._children):
            child.terminate()
            child.wait(timeout=60)


_MUNGE_FILES = {"key-file": "key", "socket": "socket", "pid-file": "pid", "log-file": "log", "seed-file": "seed"}
