"""Several machines in one, for tests: network namespaces, each with an address of its own, joined by a bridge.

Needs root, `ip` (iproute2) and `nsenter` (util-linux).
"""

import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `ip WORDS`."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def available() -> bool:
    """Whether this process may make namespaces and links."""
    if os.geteuid() != 0 or None in map(shutil.which, ("ip", "nsenter")):
        return False
    probe = f"rdp{os.getpid()}"
    made = ip("netns", "add", probe, check=False).returncode == 0 and ip("link", "add", probe, "type", "bridge", check=False)
    ip("link", "del", probe, check=False)
    ip("netns", "del", probe, check=False)
    return bool(made) and made.returncode == 0  # type: ignore[union-attr]


class Network:
    """`count` namespaces. Host k has the address .k+1 on its interface eth0.

    This process reaches all of them through the bridge.
    """

    def __init__(self, count: int) -> None:
        self._tag = f"rd{os.getpid()}"  # an interface's name has at most 15 letters
        self._subnet = f"10.213.{os.getpid() % 250}"
        self._hosts = [f"{self._tag}h{number}" for number in range(count)]

    def address(self, host: int) -> str:
        """The addresses of hosts 0..count-1."""
        return f"{self._subnet}.{host + 1}"

    @property
    def gateway(self) -> str:
        """The address of this process on the bridge."""
        return f"{self._subnet}.254"

    def open(self) -> None:
        """Creates the namespaces, the bridge and the links."""
        bridge = f"{self._tag}b"
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{self.gateway}/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, host in enumerate(self._hosts):
            cable = f"{self._tag}c{number}"
            ip("netns", "add", host)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", cable, "master", bridge, "up")
            ip("-n", host, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "route", "add", "default", "via", self.gateway)

    def start(self, host: int, *command: str, environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        """Starts a command in a host and returns its process."""
        with output.open("ab") as log:
            return subprocess.Popen([*self._inside(host), *command], env=environment, stdout=log, stderr=log)

    def run(self, host: int, *command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Runs a command in a host to its end."""
        return subprocess.run([*self._inside(host), *command], env=environment, capture_output=True, text=True, check=False)

    def processes(self, host: int) -> list[int]:
        """All processes of a host."""
        return [int(number) for number in ip("netns", "pids", self._hosts[host]).stdout.split()]

    @contextmanager
    def without_default_route(self, host: int) -> Iterator[None]:
        """Makes a host reach its neighbours and nothing beyond them."""
        ip("-n", self._hosts[host], "route", "del", "default")
        try:
            yield
        finally:
            ip("-n", self._hosts[host], "route", "add", "default", "via", self.gateway)

    def _inside(self, host: int) -> list[str]:
        """`ip netns exec` would also mount another /sys, without the cgroups that slurmd wants."""
        return ["nsenter", f"--net=/run/netns/{self._hosts[host]}"]

    def close(self) -> None:
        """Removes what open() created; processes in it must have ended."""
        for host in self._hosts:
            ip("netns", "del", host, check=False)
        ip("link", "del", f"{self._tag}b", check=False)
