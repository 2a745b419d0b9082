"""Several machines in one, for tests: network namespaces, each with an address of its own, joined by a bridge. Needs root and `ip`."""

import os
import shutil
import subprocess
from pathlib import Path


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """`ip WORDS`."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def available() -> bool:
    """Whether this process may make namespaces and links."""
    if os.geteuid() != 0 or shutil.which("ip") is None:
        return False
    probe = f"rdp{os.getpid()}"
    made = ip("netns", "add", probe, check=False).returncode == 0 and ip("link", "add", probe, "type", "bridge", check=False)
    ip("link", "del", probe, check=False)
    ip("netns", "del", probe, check=False)
    return bool(made) and made.returncode == 0  # type: ignore[union-attr]


class Network:
    """`count` namespaces. Host k has the address .k+1 on its interface eth0; this process reaches all of them through the bridge."""

    def __init__(self, count: int) -> None:
        self._tag = f"rd{os.getpid()}"  # an interface's name has at most 15 letters
        self._subnet = f"10.213.{os.getpid() % 250}"
        self._hosts = [f"{self._tag}h{number}" for number in range(count)]

    def address(self, host: int) -> str:
        """Of host 0..count-1."""
        return f"{self._subnet}.{host + 1}"

    def open(self) -> None:
        """Makes all of it."""
        bridge = f"{self._tag}b"
        ip("link", "add", bridge, "type", "bridge")
        ip("address", "add", f"{self._subnet}.254/24", "dev", bridge)
        ip("link", "set", bridge, "up")
        for number, host in enumerate(self._hosts):
            cable = f"{self._tag}c{number}"
            ip("netns", "add", host)
            ip("link", "add", cable, "type", "veth", "peer", "name", "eth0", "netns", host)
            ip("link", "set", cable, "master", bridge, "up")
            ip("-n", host, "address", "add", f"{self.address(number)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")
            ip("-n", host, "route", "add", "default", "via", f"{self._subnet}.254")

    def start(self, host: int, *command: str, environment: dict[str, str], output: Path) -> subprocess.Popen[bytes]:
        """A command on its way in a host; the process is the command's own."""
        with output.open("ab") as log:
            line = ["ip", "netns", "exec", self._hosts[host], *command]
            return subprocess.Popen(line, env=environment, stdout=log, stderr=log)

    def run(self, host: int, *command: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """A command in a host, to its end."""
        line = ["ip", "netns", "exec", self._hosts[host], *command]
        return subprocess.run(line, env=environment, capture_output=True, text=True, check=False)

    def close(self) -> None:
        """Removes what open() made; processes in it must have ended."""
        for host in self._hosts:
            ip("netns", "del", host, check=False)
        ip("link", "del", f"{self._tag}b", check=False)
