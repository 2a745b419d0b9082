"""Records the system calls of a program that change files below a folder, and says what a power cut would leave of them.

`record` runs a program under strace. `Disk` replays its calls: it knows what each file and folder holds now, and what it held when
it was last synced, which is all that a power cut must leave. At the end `Disk` holds what the real folder holds, byte for byte, so a
call that it does not understand cannot go unnoticed. Cost: a traced program takes about twice as long.
"""

import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path, PurePosixPath
from typing import Any

_WRITES = ("write", "pwrite64", "writev", "pwritev", "pwritev2")
_TRACED = (
    *("open", "openat", "openat2", "creat", "lseek", *_WRITES, "sendfile", "copy_file_range", "mmap"),
    *("truncate", "ftruncate", "fallocate", "rename", "renameat", "renameat2", "link", "linkat", "symlink", "symlinkat"),
    *("mkdir", "mkdirat", "rmdir", "unlink", "unlinkat", "fsync", "fdatasync", "sync", "syncfs", "sync_file_range"),
)
_LINE = re.compile(r"(?P<time>[0-9.]+) (?P<name>\w+)\((?P<arguments>.*)\) += (?P<result>\d+)(?:<.*)?", re.ASCII)
_TEMPORARY = re.compile(r"(?:.*/)?[^/]+\.tmp(?:/.*)?")
_HANDLE = re.compile(r"(?:-?\d+|AT_FDCWD)<(?P<path>[^>]*)>(?P<deleted>\(deleted\))?")


@cache
def missing() -> str | None:
    """Why calls cannot be recorded on this machine, or None."""
    if shutil.which("strace") is None:
        return "strace is not installed: apt-get install strace"
    done = subprocess.run(["strace", "-f", "-o", os.devnull, "true"], capture_output=True, text=True, check=False)
    return None if done.returncode == 0 else f"strace may not trace here: {done.stderr.strip()[:200]}"


@dataclass(frozen=True)
class Call:
    """A call that succeeded. places: the paths that it names, absolute. data: the bytes that it wrote."""

    name: str
    places: tuple[str, ...]
    arguments: str
    result: int
    data: bytes = b""


def record(words: Sequence[str], root: Path, log: Path, **options: Any) -> tuple[subprocess.CompletedProcess[str], list[Call]]:
    """Runs a program with all its children, and returns their calls on what lies below `root`, in order.

    log: a new folder for strace. options: of subprocess.run.
    """
    log.mkdir()
    strace = ["strace", "-ff", "-ttt", "-qq", "--seccomp-bpf", "-y", "-xx", "-s", str(1 << 25), "-e", "signal=none"]
    command = [*strace, "-e", f"trace={','.join(_TRACED)}", "-o", str(log / "calls"), "--", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=False, **options)
    mark = _hex(str(root))
    timed = [call for file in log.iterdir() for call in _read(file, mark)]
    shutil.rmtree(log)
    return done, [call for _, call in sorted(timed, key=lambda item: item[0])]


def _hex(text: str) -> str:
    return "".join(f"\\x{byte:02x}" for byte in text.encode())


def _bytes(text: str) -> bytes:
    return bytes.fromhex(text.replace("\\x", ""))


def _read(file: Path, mark: str) -> Iterator[tuple[float, Call]]:
    with file.open(encoding="ascii") as lines:
        for line in lines:
            match = _LINE.match(line) if mark in line else None
            if match is not None and "(deleted)" not in line:
                yield float(match["time"]), _parsed(match["name"], match["arguments"], int(match["result"]))


def _parsed(name: str, arguments: str, result: int) -> Call:
    places, data, above = [], b"", ""
    for argument in arguments.split(", "):
        if handle := _HANDLE.fullmatch(argument):
            above = _bytes(handle["path"]).decode()
            places.append(above)
        elif argument.startswith('"') and name not in _WRITES:
            path = _bytes(argument.strip('"')).decode()
            if above:
                places.pop()  # the folder that a relative path starts from
            places.append(os.path.join(above, path))
            above = ""
    if name in _WRITES:
        data = b"".join(map(_bytes, re.findall(r'"((?:\\x[0-9a-f]{2})*)"', arguments)))[:result]
    return Call(name, tuple(places), arguments, result, data)


@dataclass
class File:
    """data: what it holds. synced: what it held when it was last synced. cursor: where the next write goes."""

    data: bytearray = field(default_factory=bytearray)
    synced: bytes = b""
    cursor: int = 0

    @property
    def is_synced(self) -> bool:
        return self.data == self.synced

    def sync(self) -> None:
        self.synced = bytes(self.data)

    def write(self, data: bytes, at: int) -> None:
        self.data.extend(bytes(max(at - len(self.data), 0)))
        self.data[at : at + len(data)] = data
        self.cursor = at + len(data)


@dataclass
class Folder:
    """names: what it holds, by name. synced: what it held when it was last synced."""

    names: "dict[str, File | Folder]" = field(default_factory=dict)
    synced: "dict[str, File | Folder]" = field(default_factory=dict)

    @property
    def is_synced(self) -> bool:
        own = self.names.keys() == self.synced.keys() and all(self.synced[name] is node for name, node in self.names.items())
        return own and all(node.is_synced for node in self.names.values())

    def sync(self) -> None:
        self.synced = dict(self.names)


State = dict[str, bytes | None]  # path from the root -> its bytes, None for a folder


class Disk:
    """What lies below the folder `root`, which is empty before the first call."""

    def __init__(self, root: Path) -> None:
        self._root, self.top = PurePosixPath(root), Folder()

    def apply(self, call: Call) -> None:
        """Does what a call did. Raises ValueError for one that it does not know."""
        action = getattr(self, f"_{call.name}", None)
        if action is None:
            raise ValueError(f"{call.name}({call.arguments[:200]}) is not replayed")
        action(call)

    def find(self, path: str) -> File | Folder | None:
        """What stands at an absolute path; None if nothing does, or it is not below the root."""
        node: File | Folder | None = self.top
        if not PurePosixPath(path).is_relative_to(self._root):
            return None
        for name in PurePosixPath(path).relative_to(self._root).parts:
            node = node.names.get(name) if isinstance(node, Folder) else None
        return node

    def above(self, path: str) -> Folder:
        """The folder that holds the name of an absolute path."""
        found = self.find(str(PurePosixPath(path).parent))
        assert isinstance(found, Folder), path
        return found

    def _is_below(self, path: str) -> bool:
        return PurePosixPath(path).is_relative_to(self._root)

    def state(self, *, all_names: bool, all_bytes: bool = False) -> State:
        """What a power cut leaves: of each file the bytes that were synced, and the names that were synced, or all of them.

        A file system may write names before it is asked to, and before the bytes of their files. With both, it is what stands there
        now.
        """
        found: State = {}

        def walk(folder: Folder, above: str) -> None:
            for name, node in (folder.names if all_names else folder.synced).items():
                if isinstance(node, Folder):
                    found[f"{above}{name}"] = None
                    walk(node, f"{above}{name}/")
                else:
                    found[f"{above}{name}"] = bytes(node.data) if all_bytes else node.synced

        walk(self.top, "")
        return found

    def now(self) -> State:
        """Everything, synced or not."""
        return self.state(all_names=True, all_bytes=True)

    def _openat(self, call: Call) -> None:
        path = call.places[0]
        if not self._is_below(path) or "O_TMPFILE" in call.arguments:
            return
        node = self.find(path)
        if node is None and "O_CREAT" in call.arguments:
            node = self.above(path).names[PurePosixPath(path).name] = File()
        if isinstance(node, File) and re.search("O_WRONLY|O_RDWR", call.arguments):
            if "O_TRUNC" in call.arguments:
                node.data.clear()
            node.cursor = len(node.data) if "O_APPEND" in call.arguments else 0

    _open = _openat

    def _write(self, call: Call) -> None:
        if isinstance(node := self.find(call.places[0]), File):
            node.write(call.data, node.cursor)

    _writev = _write

    def _pwrite64(self, call: Call) -> None:
        if isinstance(node := self.find(call.places[0]), File):
            node.write(call.data, int(call.arguments.rpartition(", ")[2]))

    def _sendfile(self, call: Call) -> None:
        target, source = (self.find(place) for place in call.places[:2])
        if isinstance(target, File):
            data = bytes(source.data) if isinstance(source, File) else Path(call.places[1]).read_bytes()
            start = re.search(r"\[(\d+)\]", call.arguments)
            assert start is not None, "a copy from where the file stands"
            target.write(data[int(start[1]) :][: call.result], target.cursor)

    def _lseek(self, call: Call) -> None:
        if isinstance(node := self.find(call.places[0]), File):
            node.cursor = call.result

    def _ftruncate(self, call: Call) -> None:
        if isinstance(node := self.find(call.places[0]), File):
            size = int(call.arguments.rpartition(", ")[2])
            node.data[size:] = bytes(max(size - len(node.data), 0))

    def _fallocate(self, call: Call) -> None:
        if isinstance(node := self.find(call.places[0]), File):
            offset, size = map(int, call.arguments.split(", ")[-2:])
            node.data.extend(bytes(max(offset + size - len(node.data), 0)))

    def _mmap(self, call: Call) -> None:
        if "PROT_WRITE" in call.arguments and "MAP_SHARED" in call.arguments:
            raise ValueError(f"{call.places} is written through a mapping, which cannot be recorded")

    def _rename(self, call: Call) -> None:
        source, target = call.places
        node = self.above(source).names.pop(PurePosixPath(source).name)
        self.above(target).names[PurePosixPath(target).name] = node

    _renameat = _renameat2 = _rename

    def _mkdir(self, call: Call) -> None:
        path = call.places[0]
        if self._is_below(path) and path != str(self._root):
            self.above(path).names[PurePosixPath(path).name] = Folder()

    _mkdirat = _mkdir

    def _unlink(self, call: Call) -> None:
        del self.above(call.places[0]).names[PurePosixPath(call.places[0]).name]

    _unlinkat = _rmdir = _unlink

    def _fsync(self, call: Call) -> None:
        if (node := self.find(call.places[0])) is not None:
            node.sync()

    _fdatasync = _fsync


def content_of(root: Path) -> State:
    """What a real folder holds."""
    return {path.relative_to(root).as_posix(): path.read_bytes() if path.is_file() else None for path in sorted(root.rglob("*"))}


def put(state: State, root: Path) -> None:
    """Makes a real folder hold a state."""
    root.mkdir(parents=True)
    for name, data in sorted(state.items()):
        if data is None:
            (root / name).mkdir(parents=True, exist_ok=True)
        else:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(data)


@dataclass(frozen=True)
class Rules:
    """transient: names below the root, as regular expressions, that nobody reads after a power cut. grows: files that grow by
    lines."""

    transient: str
    grows: str


def faults(calls: Sequence[Call], root: Path, rules: Rules) -> list[str]:
    """What was written in another way than to a temporary name, synced, renamed, and the folder synced; empty if nothing was.

    Also what was taken away or written over before what replaces it stood, and what is not on the disk at the end.
    """
    disk, found, gone = Disk(root), [], set[str]()

    def is_exempt(name: str, *, growing: bool = False) -> bool:
        return re.fullmatch(f"(?:{rules.transient}{'|' + rules.grows if growing else ''})(?:/.*)?", name) is not None

    def name_of(path: str) -> str:
        return str(PurePosixPath(path).relative_to(root)) if PurePosixPath(path).is_relative_to(root) else ""

    def is_on_disk(path: str) -> bool:
        node, above = disk.find(path), disk.above(path)
        return node is not None and above.synced.get(PurePosixPath(path).name) is node

    for call in calls:
        changed = name_of(call.places[-1]) if call.places else ""
        exempt = not changed or is_exempt(changed) or _TEMPORARY.fullmatch(changed)  # judged when it is put in its place
        if not exempt and call.name.startswith("rename"):
            node = disk.find(call.places[0])
            if node is None or not node.is_synced:
                found.append(f"{changed} was renamed before it was synced")
            if changed in gone:
                found.append(f"{changed} was taken away before what replaces it stood")
        elif not exempt and call.name in ("unlink", "unlinkat", "rmdir") and is_on_disk(call.places[-1]):
            gone.add(changed)
        elif call.name in (*_WRITES, "sendfile", "ftruncate"):
            target = name_of(call.places[0])
            if target and not is_exempt(target, growing=True) and is_on_disk(call.places[0]) and disk.find(call.places[0]):
                found.append(f"{target} was written over where it stood")
        disk.apply(call)
    durable, now = disk.state(all_names=False), disk.now()
    found += [
        f"{name} is not on the disk at the end"
        for name, data in now.items()
        if not is_exempt(name, growing=True) and (name not in durable or durable[name] != data)
    ]
    return sorted(set(found))
