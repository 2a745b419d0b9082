"""A folder of files, on this machine, in an object store, or on another file system that pyarrow opens.

A prepared data set or the remote copy of a run can be at `s3://bucket/prefix`, `gs://bucket/prefix` or `hdfs://host:port/path`.
Options that pyarrow takes follow a question mark (`?endpoint_override=host:9000&scheme=http`). Credentials come from where the
store's own tools look for them; a URI that holds credentials is rejected. If a store does not answer, the code gives up within
40 s.
"""

import hashlib
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import pyarrow as pa
from pyarrow import fs

from rec_dist.errors import UnreachableError, UserError
from rec_dist.storage.files import make_folder, put_in_place
from rec_dist.storage.uri import is_below, is_remote, local_path, refuse_credentials, shown

_SCHEMES = ("s3", "gs", "hdfs")
_OBJECT_STORES = ("s3", "gcs")  # pyarrow's names; an object appears once its last byte is written, and needs no folder
_CHUNK_BYTES = 16 << 20  # bytes per request to an object store; at 4 MiB the latency of requests would dominate
_CONNECT_SECONDS, _SILENT_SECONDS = 5.0, 6.0  # limits of one attempt: until S3 is connected; without a byte sent or received
_ATTEMPTS = 5  # pauses between them add up to 7 s at most
_RETRY_SECONDS = 15  # Google's client spends this twice: on the token and on the request
_REASON = 200  # characters of a reason that a message shows; pyarrow explains a missing libhdfs on forty lines
_OF_A_STORE = "check the address, the credentials and the network"
_OF_A_FOLDER = "see that the folder can be read and written, and that its disk has room"
_FAULTS = (OSError, pa.ArrowException)
_Found = TypeVar("_Found")


class NoSuchFileError(FileNotFoundError):
    """The location holds no file of this name."""


@dataclass(frozen=True)
class Stored:
    """A file's bytes, and when it was written, in seconds since 1970."""

    bytes: int
    written: float


class Location:
    """A folder of files. str() is the form that messages show: an absolute path, or the URI without options and credentials."""

    def __init__(self, path: str | Path, *, key: str = "data.path") -> None:
        """Opens the folder or URI that the configuration key `key` names.

        Raises UserError if the URI has an unknown scheme, holds credentials, or names a file system that cannot be opened.
        """
        text, self._key = str(path), key
        self.is_remote, self._pid, self._inherited = is_remote(text), os.getpid(), None
        self._way_out = _OF_A_STORE if self.is_remote else _OF_A_FOLDER
        if not self.is_remote:
            self.folder = local_path(text)
            self._opened, self._base, self._shown = fs.LocalFileSystem(), str(self.folder), str(self.folder)
            return
        self._uri, self._shown = text, shown(text)
        if text.partition("://")[0] not in _SCHEMES:
            raise UserError(
                f"{key} ({self._shown}) cannot be opened: its scheme is not s3, gs or hdfs; give a URI of these, or a folder"
            )
        refuse_credentials(text, key)
        try:
            self._opened, base = _system_of(text)
        except (ValueError, *_FAULTS) as fault:
            raise UserError(f"{key} ({self._shown}) cannot be opened: {reason(fault, text)}; {self._way_out}") from None
        self._base = base.rstrip("/")

    @property
    def _system(self) -> Any:
        """The file system. A forked process opens its own: on a connection that it shares it would read answers to others."""
        if self.is_remote and self._pid != os.getpid():
            self._inherited = self._opened  # kept, since its end would close connections that are not ours
            self._opened, self._pid = _system_of(self._uri)[0], os.getpid()
        return self._opened

    def __str__(self) -> str:
        return self._shown

    def name(self, file: str) -> str:
        """The name of a file of this folder as messages show it."""
        return f"{self._shown}/{file}"

    def _at(self, file: str) -> str:
        """The path of a file of this folder for the file system. Raises UserError if its name leads out of the folder."""
        if not is_below(file):
            raise UserError(f"{self._key} ({self}) cannot hold a file named {file[:200]!r}; remove what names it")
        return f"{self._base}/{file}"

    def read(self, file: str) -> bytes | None:
        """Returns the bytes of a small file, or None if there is no such file. Raises UserError if the file cannot be read."""
        with self._faults(f"{self._key}: {self.name(file)} cannot be read"):
            try:
                with self._system.open_input_stream(self._at(file)) as stream:
                    return bytes(stream.read())
            except (FileNotFoundError, NotADirectoryError):
                return None

    def sizes(self) -> dict[str, int]:
        """The bytes of each file of this folder, by its name. Raises UserError if the folder cannot be listed."""
        return {entry.base_name: entry.size for entry in self._files(recursive=False)}

    def tree(self) -> dict[str, Stored]:
        """All files below this folder, by their paths relative to it. Raises UserError if the folder cannot be listed.

        Leaves out keys of an object store that are no valid paths on a file system.
        """
        files = [(entry.path.removeprefix(f"{self._base}/"), entry) for entry in self._files(recursive=True)]
        return {name: Stored(entry.size, (entry.mtime_ns or 0) / 1e9) for name, entry in files if is_below(name)}

    def stored(self, file: str) -> Stored | None:
        """The size and time of a file, or None if there is no such file. Raises UserError if the store does not answer."""
        with self._faults(f"{self._key}: {self.name(file)} cannot be read"):
            entry = self._system.get_file_info(self._at(file))
        return Stored(entry.size, (entry.mtime_ns or 0) / 1e9) if entry.type == fs.FileType.File else None

    def _files(self, *, recursive: bool) -> list[Any]:
        with self._faults(f"{self._key} ({self}) cannot be listed"):
            found = self._system.get_file_info(fs.FileSelector(self._base, allow_not_found=True, recursive=recursive))
        return [entry for entry in found if entry.type == fs.FileType.File]

    def lacks_bucket(self) -> bool:
        """Whether the bucket itself is known to be missing."""
        if self._system.type_name not in _OBJECT_STORES:
            return False
        try:
            return bool(self._system.get_file_info(self._base.partition("/")[0]).type == fs.FileType.NotFound)
        except _FAULTS:  # these credentials may not ask for buckets
            return False

    def copy(self, file: str, target: Path) -> str:
        """Streams a file to `target` and returns its SHA-256 in hex.

        Raises NoSuchFileError if there is no such file, UnreachableError if it cannot be read to its end, and any other
        OSError if `target` cannot be written.
        """
        digest = hashlib.sha256()
        with self._reading(file, self._system.open_input_stream, self._at(file)) as stream:
            target.touch()
            with target.open("r+b") as written:  # without truncation: the node's cache reserves room by the size of the file
                while chunk := self._reading(file, stream.read, _CHUNK_BYTES):
                    digest.update(chunk)
                    written.write(chunk)
                written.truncate()
        return digest.hexdigest()

    def use(self, file: str, action: Callable[[Any], _Found]) -> _Found:
        """What `action` returns for the file, which is open for reading at any place: only the parts that it reads are fetched.

        Raises NoSuchFileError if there is no such file, and UnreachableError if it cannot be read.
        """
        with self._reading(file, self._system.open_input_file, self._at(file)) as opened:
            found: _Found = self._reading(file, action, opened)
        return found

    def write(self, source: Path | pa.Buffer, file: str) -> None:
        """Copies a file, or bytes in memory, to this folder under the name `file`, whole or not at all, and synced if it is local.

        Raises FileNotFoundError if there is no `source`, and UserError if the file cannot be written.
        """
        target = self._at(file)
        partial = target if self._system.type_name in _OBJECT_STORES else f"{target}.tmp"
        opened = source.open("rb") if isinstance(source, Path) else pa.BufferReader(source)
        with opened as stream, self._faults(f"{self._key}: {self.name(file)} cannot be written"):
            above = target.rpartition("/")[0]
            if not self.is_remote:
                make_folder(self.folder, "owner")
                make_folder(Path(above))
            elif partial != target:
                self._system.create_dir(above, recursive=True)
            with self._system.open_output_stream(partial) as sink:
                while chunk := stream.read(_CHUNK_BYTES):
                    sink.write(chunk)
            if self._system.type_name == "hdfs":  # it does not rename over an existing file
                self.remove(file)
            if not self.is_remote:
                put_in_place(Path(partial), Path(target))
            elif partial != target:
                self._system.move(partial, target)

    def remove(self, file: str) -> None:
        """Removes a file, if it exists, and its folder below this one if that is then empty.

        Raises UserError if the file cannot be removed.
        """
        path = self._at(file)
        above = path.rpartition("/")[0]
        with self._faults(f"{self._key}: {self.name(file)} cannot be removed"), suppress(FileNotFoundError):
            self._system.delete_file(path)
            has_folders = self._system.type_name not in _OBJECT_STORES
            if has_folders and above != self._base and not self._system.get_file_info(fs.FileSelector(above)):
                self._system.delete_dir(above)

    def remove_folder(self, folder: str) -> None:
        """Removes a folder below this one, if it exists, with all files in it. Raises UserError if it cannot be removed."""
        with self._faults(f"{self._key}: {self.name(folder)} cannot be removed"), suppress(FileNotFoundError):
            self._system.delete_dir(self._at(folder))

    @contextmanager
    def _faults(self, what: str) -> Iterator[None]:
        """Turns a fault of the file system into a UserError that begins with `what` and ends with the way out."""
        try:
            yield
        except _FAULTS as fault:
            raise UserError(f"{what}: {reason(fault)}; {self._way_out}") from None

    def _reading(self, file: str, action: Any, *arguments: Any) -> Any:
        try:
            return action(*arguments)
        except FileNotFoundError:
            raise NoSuchFileError(f"{self.name(file)} is missing") from None
        except _FAULTS as fault:
            way_out = "the store answers" if self.is_remote else "the folder can be read"
            raise UnreachableError(
                f"{self.name(file)} cannot be read: {reason(fault)}; see that {way_out} and run the same command again"
            ) from None


def _system_of(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it, with limits on how long a store may take.

    pyarrow's own limits are 99 s for an S3 server that never answers and 15 minutes for Google Cloud Storage. A URI cannot set
    those of S3. So this code builds the file system again from its own options and these limits, as unpickling would.
    """
    system, base = fs.FileSystem.from_uri(uri)
    if system.type_name not in _OBJECT_STORES:
        return system, base
    build, (options,) = system.__reduce__()
    if system.type_name == "s3":
        attempts = fs.AwsStandardS3RetryStrategy(max_attempts=_ATTEMPTS)
        limits = {"connect_timeout": _CONNECT_SECONDS, "request_timeout": _SILENT_SECONDS, "retry_strategy": attempts}
    else:
        limits = {"retry_time_limit": options["retry_time_limit"] or timedelta(seconds=_RETRY_SECONDS)}
    return build({**options, **limits}), base


def reason(fault: Exception, uri: str | None = None) -> str:
    """The first line of a library's message, cut to 200 characters. Hides the credentials and options of `uri` in it."""
    words = str(fault) if uri is None else str(fault).replace(uri, shown(uri))
    return next(iter(words.splitlines()), type(fault).__name__)[:_REASON]
