"""A Ray cluster for tests: one CPU a node, each node in a network namespace with an address of its own (namespaces.py).

The nodes share this machine's disk, as nodes share storage, or have disks of their own (own_disks), as machines without any.
"""

import io
import os
import secrets
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
from namespaces import HOME, WORK, Network

TIMEOUT_SECONDS = 600.0  # a job takes a minute on two free cores


class RayNodes:
    """A head, node 0, and nodes that join it. environment: variables of the nodes, and so of their workers."""

    def __init__(self, folder: Path, network: Network, *, own_disks: bool, **environment: str) -> None:
        self.network = network
        self._folder, self._own_disks, self._of_nodes = folder, own_disks, environment
        self._nodes: list[subprocess.Popen[bytes]] = []
        kept = {name: value for name, value in os.environ.items() if not name.startswith("RAY_") and name != "PYTHONPATH"}
        kept["PATH"] = f"{Path(sys.executable).parent}:{kept['PATH']}"
        kept |= {"HOME": HOME, "TMPDIR": "/tmp"} if own_disks else {}
        self.environment = {
            **kept,
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN": secrets.token_hex(32),
            "RAY_USAGE_STATS_ENABLED": "0",
        }
        self._head = f"{network.address(0)}:6379"

    @staticmethod
    @contextmanager
    def opened(count: int, *, own_disks: bool = False, **environment: str) -> "Iterator[RayNodes]":
        """The network of `count` nodes, none of which has started. At the end nothing of it is left."""
        folder, network = Path(tempfile.mkdtemp(prefix="n4", dir="/tmp")), Network(count)  # short, for Ray's sockets
        nodes = RayNodes(folder, network, own_disks=own_disks, **environment)
        try:
            network.open()
            yield nodes
        finally:
            nodes.close()
            network.close()
            shutil.rmtree(folder, ignore_errors=True)

    @property
    def dashboard(self) -> str:
        """The job server's address."""
        return f"http://{self.network.address(0)}:8265"

    def join(self, count: int) -> None:
        """Starts nodes until there are `count`, and returns when all have joined."""
        for host in range(len(self._nodes), count):
            place = self._folder / str(host)
            place.mkdir()
            place = Path("/tmp/ray") if self._own_disks else place
            words = [f"--node-ip-address={self.network.address(host)}", f"--temp-dir={place}", "--num-cpus=1", "--block"]
            words += ["--object-store-memory=80000000"]
            head = ["--head", "--port=6379", "--include-dashboard=true", "--dashboard-host=0.0.0.0"]
            words += head if host == 0 else [f"--address={self._head}"]
            # gloo would look up this host's name, whose address belongs to no namespace
            own = {"GLOO_SOCKET_IFNAME": "eth0", "RAY_memory_monitor_refresh_ms": "0", **self._of_nodes}
            self._nodes.append(
                self.network.start(
                    host,
                    *("ray", "start", *words),
                    environment={**self.environment, **own},
                    output=self._folder / f"node-{host}.txt",
                    own_disk=self._own_disks,
                )
            )
            self._wait(lambda wanted=host + 1: self.alive() == wanted, f"node {host} joins")

    def alive(self) -> int:
        """How many nodes the head counts; 0 if it does not answer."""
        code = "import ray; ray.init(log_to_driver=False, logging_level='ERROR'); print(sum(n['Alive'] for n in ray.nodes()))"
        done = self.run(0, "python", "-c", code)
        return int(done.stdout.split()[-1]) if done.returncode == 0 else 0

    def run(self, host: int, *command: str, sent: bytes = b"", **environment: str) -> subprocess.CompletedProcess[bytes]:
        """Runs a command on a node to its end. Ray's address is that of the head."""
        own = {**self.environment, "RAY_ADDRESS": self._head, **environment}
        beside = self._nodes[host] if self._own_disks else None
        done = self.network.run(host, *command, environment=own, beside=beside, sent=sent)
        assert self._nodes[host].poll() is None, (f"node {host} has ended", self._told())
        return done

    def copy(self, folder: Path, host: int, target: str) -> None:
        """Copies a folder to the node's own disk, below WORK."""
        packed = io.BytesIO()
        with tarfile.open(fileobj=packed, mode="w") as archive:
            archive.add(folder, target)
        done = self.run(host, "tar", "--extract", f"--directory={WORK}", sent=packed.getvalue())
        assert done.returncode == 0, done.stderr

    def kill(self, host: int) -> None:
        """Kills every process of a node at once, as when it loses power."""
        node = self._nodes[host]
        for process in [*psutil.Process(node.pid).children(recursive=True), psutil.Process(node.pid)]:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        node.wait()

    def close(self) -> None:
        """Kills all nodes."""
        for host in reversed(range(len(self._nodes))):
            if self._nodes[host].poll() is None:
                self.kill(host)
            with suppress(subprocess.CalledProcessError, psutil.NoSuchProcess):
                for process in map(psutil.Process, self.network.processes(host)):  # whose parent was gone already
                    process.kill()

    def _wait(self, what: Callable[[], bool], why: str) -> None:
        until = time.monotonic() + TIMEOUT_SECONDS
        while not what():
            assert all(node.poll() is None for node in self._nodes), (why, self._told())
            assert time.monotonic() < until, (why, self._told())
            time.sleep(0.5)

    def _told(self) -> dict[str, str]:
        """The last lines of each node."""
        return {path.name: path.read_text(errors="replace")[-2000:] for path in self._folder.glob("node-*.txt")}
