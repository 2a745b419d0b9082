"""Several machines in one, for tests: network namespaces, each with an address of its own, joined by a bridge.

A process started with own_disk=True is also alone with its processes and its files: it has an empty /tmp, /var/tmp and /dev/shm, and
sees others only over the network. Of this machine's disk it shares the installed programs. When it ends, or whoever started it, all
its processes end.

Needs root, `ip` (iproute2), and `nsenter`, `setpriv` and `unshare` (util-linux).
"""

import os
import re
import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

WORK = "/tmp/work"  # the working folder of a process with a disk of its own
HOME = "/tmp/home"
_ALONE = ("unshare", "--mount", "--propagation=private", "--pid", "--fork", "--kill-child", "--mount-proc")
_EMPTY = f'for place in /tmp /var/tmp /dev/shm; do mount -t tmpfs own "$place"; done; mkdir {HOME} {WORK}; cd {WORK}; exec "$@"'


def ip(*words: str, check: bool = True) -> subprocess.CompletedProcess[str]:
    """Runs `ip WORDS`."""
    return subprocess.run(["ip", *words], check=check, capture_output=True, text=True)


def available() -> bool:
    """Whether this process may make namespaces and links."""
    if os.geteuid() != 0 or None in map(shutil.which, ("ip", "nsenter", "setpriv", "unshare")):
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
        """Creates the namespaces, the bridge and the links. Removes those of a test run that was killed."""
        names = re.findall(r"\brd(\d+)([hbc]\d*)\b", ip("netns", "list").stdout + ip("-brief", "link").stdout)
        for owner, name in names:
            if not psutil.pid_exists(int(owner)):
                ip(*(("netns", "del") if name.startswith("h") else ("link", "del")), f"rd{owner}{name}", check=False)
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

    def start(
        self, host: int, *command: str, environment: dict[str, str], output: Path, own_disk: bool = False
    ) -> subprocess.Popen[bytes]:
        """Starts a command in a host and returns its process."""
        words = [*self._inside(host), "setpriv", "--pdeathsig=KILL"] if own_disk else self._inside(host)
        words += [*_ALONE, "sh", "-ec", _EMPTY, "sh"] if own_disk else []
        with output.open("ab") as log:
            return subprocess.Popen([*words, *command], env=environment, stdout=log, stderr=log)

    def run(
        self,
        host: int,
        *command: str,
        environment: dict[str, str],
        beside: subprocess.Popen[bytes] | None = None,
        sent: bytes = b"",
    ) -> subprocess.CompletedProcess[bytes]:
        """Runs a command in a host to its end. beside: on the disk of what start() started there with own_disk. sent: its input."""
        inside = self._inside(host)
        if beside is not None:
            while not (children := psutil.Process(beside.pid).children()):
                assert beside.poll() is None, "it has ended"
                time.sleep(0.01)
            (first,) = children
            inside = ["nsenter", f"--target={first.pid}", "--net", "--mount", "--pid", "sh", "-ec", f'cd {WORK}; exec "$@"', "sh"]
        return subprocess.run([*inside, *command], env=environment, input=sent, capture_output=True, check=False, timeout=900)

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
        for number, host in enumerate(self._hosts):
            # The kernel keeps a namespace, with its end of the link, for as long as connections of dead processes close.
            ip("link", "del", f"{self._tag}c{number}", check=False)
            ip("netns", "del", host, check=False)
        ip("link", "del", f"{self._tag}b", check=False)
