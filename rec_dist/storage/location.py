"""Where a prepared data set or the copy of a run lies: a folder here, or one of an object store or file system that pyarrow knows.

`s3://bucket/prefix`, `gs://bucket/prefix` and `hdfs://host:port/path`, with the options that pyarrow takes behind a question mark
(`?endpoint_override=host:9000&scheme=http`). Credentials come from where the store's own tools look for them; in a URI they are
refused. A store that does not answer is given up within 40 s.
"""

import hashlib
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rec_dist.errors import UnreachableError, UserError
from rec_dist.storage.files import is_remote
from rec_dist.storage.uri import refuse_credentials, shown

_CHUNK_BYTES = 16 << 20  # one request of an object store; at 4 MiB its latency would show
_CONNECT_SECONDS, _SILENT_SECONDS = 5.0, 6.0  # of one attempt: until S3 is connected; that no byte comes or goes
_ATTEMPTS = 5  # with pauses of up to 7 s in all between them
_RETRY_SECONDS = 15  # of Google's client, which spends them twice: on the token and on the request
_NAME_BYTES = 255  # of a file's name on a file system
_REASON = 200  # characters of a reason; a missing libhdfs is explained on forty lines


@dataclass(frozen=True)
class Stored:
    """A file: its bytes, and when it was written, in seconds since 1970."""

    bytes: int
    written: float


class Location:
    """A folder of files. str() of it is what messages show: an absolute path, or the URI without options and credentials.

    key: what the user set it with.
    """

    def __init__(self, path: str | Path, *, key: str = "data.path") -> None:
        """UserError: another scheme, credentials in the URI, or a file system that cannot be opened."""
        text, self._key = str(path), key
        self.is_remote = is_remote(text)
        self._way_out = _OF_A_STORE if self.is_remote else _OF_A_FOLDER
        if not self.is_remote:
            self.folder = Path(text.removeprefix("file://")).expanduser().absolute()
            self._system, self._base, self._shown = fs.LocalFileSystem(), str(self.folder), str(self.folder)
            return
        self._shown = shown(text)
        if text.partition("://")[0] not in _SCHEMES:
            raise UserError(
                f"{key} ({self._shown}) cannot be opened: another scheme than s3, gs and hdfs; give a URI of these, or a folder"
            )
        refuse_credentials(text, key)
        try:
            self._system, base = _system_of(text)
        except (OSError, ValueError, pa.ArrowException) as fault:
            raise UserError(f"{key} ({self._shown}) cannot be opened: {reason(fault, text)}; {self._way_out}") from None
        self._base = base.rstrip("/")

    def __str__(self) -> str:
        return self._shown

    def name(self, file: str) -> str:
        """How messages call a file of this folder."""
        return f"{self._shown}/{file}"

    def read(self, file: str) -> bytes | None:
        """The bytes of a small file; None where there is no such file. UserError: the folder cannot be read."""
        try:
            with self._system.open_input_stream(f"{self._base}/{file}") as stream:
                return bytes(stream.read())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key}: {self.name(file)} cannot be read: {reason(fault)}; {self._way_out}") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of this folder by its name. UserError: it cannot be listed."""
        try:
            found = self._system.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key} ({self}) cannot be listed: {reason(fault)}; {self._way_out}") from None
        return {entry.base_name: entry.size for entry in found if entry.type == fs.FileType.File}

    def tree(self) -> dict[str, Stored]:
        """Every file below this folder by its path from here, but for keys of an object store that no folder can hold.

        UserError: it cannot be listed.
        """
        try:
            found = self._system.get_file_info(fs.FileSelector(self._base, allow_not_found=True, recursive=True))
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key} ({self}) cannot be listed: {reason(fault)}; {self._way_out}") from None
        files = [(entry.path.removeprefix(f"{self._base}/"), entry) for entry in found if entry.type == fs.FileType.File]
        return {name: Stored(entry.size, (entry.mtime_ns or 0) / 1e9) for name, entry in files if is_below(name)}

    def lacks_bucket(self) -> bool:
        """Whether it can be told that the bucket itself is not there."""
        if self._system.type_name not in _OBJECT_STORES:
            return False
        try:
            return bool(self._system.get_file_info(self._base.partition("/")[0]).type == fs.FileType.NotFound)
        except (OSError, pa.ArrowException):  # not allowed to ask
            return False

    def copy(self, file: str, target: Path) -> str:
        """Writes a file's bytes to `target` as they come and returns their SHA-256 in hex.

        UserError: there is no such file. UnreachableError: it cannot be read to its end. OSError: `target` cannot be written.
        """
        digest = hashlib.sha256()
        target.touch()
        with target.open("r+b") as written, self._opened(file) as stream:  # not emptied: its size may hold room in a cache
            while chunk := self._next(stream, file):
                digest.update(chunk)
                written.write(chunk)
            written.truncate()
        return digest.hexdigest()

    def write(self, source: Path, file: str) -> None:
        """Copies the file `source` to here under the name `file`, whole or not at all. FileNotFoundError: there is no `source`.

        UserError: it cannot be written.
        """
        target = f"{self._base}/{file}"
        partial = target if self._system.type_name in _OBJECT_STORES else f"{target}.tmp"
        with source.open("rb") as stream:
            try:
                if partial != target:
                    self._system.create_dir(target.rpartition("/")[0], recursive=True)
                with self._system.open_output_stream(partial) as sink:
                    while chunk := stream.read(_CHUNK_BYTES):
                        sink.write(chunk)
                if self._system.type_name == "hdfs":  # which renames to no name that is taken
                    self.remove(file)
                if partial != target:
                    self._system.move(partial, target)
            except (OSError, pa.ArrowException) as fault:
                raise UserError(f"{self._key}: {self.name(file)} cannot be written: {reason(fault)}; {self._way_out}") from None

    def remove(self, file: str) -> None:
        """Removes a file, and its folder below this one when nothing else is there. One that is not there is fine.

        UserError: it cannot be removed.
        """
        path = f"{self._base}/{file}"
        above = path.rpartition("/")[0]
        try:
            self._system.delete_file(path)
            has_folders = self._system.type_name not in _OBJECT_STORES
            if has_folders and above != self._base and not self._system.get_file_info(fs.FileSelector(above)):
                self._system.delete_dir(above)
        except FileNotFoundError:
            pass
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key}: {self.name(file)} cannot be removed: {reason(fault)}; {self._way_out}") from None

    def _opened(self, file: str) -> Any:
        try:
            return self._system.open_input_stream(f"{self._base}/{file}")
        except FileNotFoundError:
            raise UserError(f"{self.name(file)}: the file is missing; {REMEDY}") from None
        except (OSError, pa.ArrowException) as fault:
            raise self._unreachable(file, fault) from None

    def _next(self, stream: Any, file: str) -> bytes:
        try:
            return bytes(stream.read(_CHUNK_BYTES))
        except (OSError, pa.ArrowException) as fault:
            raise self._unreachable(file, fault) from None

    def _unreachable(self, file: str, fault: Exception) -> UnreachableError:
        place = "store answers" if self.is_remote else "folder can be read"
        return UnreachableError(
            f"{self.name(file)} cannot be read: {reason(fault)}; see that the {place} and run the same command again"
        )


_SCHEMES = ("s3", "gs", "hdfs")
_OBJECT_STORES = ("s3", "gcs")  # an object is there once its batch is closed; no folders need be made
REMEDY = "remove the data set and run `rec-dist prepare CONFIG` again"
_OF_A_STORE = "check the address, the credentials and the network"
_OF_A_FOLDER = "see that the folder can be read and written, and that its disk has room"


def _system_of(uri: str) -> tuple[Any, str]:
    """The file system of a URI and the path in it, with limits on how long a store may take.

    pyarrow's own: 99 s for S3 that never answers, 15 minutes for Google Cloud Storage. No URI sets those of S3, so the file system is
    built again, as a pickle would, with its options and these.
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


def is_below(name: str) -> bool:
    """Whether a file system can hold `name` below a folder: an object store allows `..`, empty parts and 1,024 bytes in keys."""
    parts = name.split("/")
    return "\0" not in name and all(part not in ("", ".", "..") and len(part.encode()) <= _NAME_BYTES for part in parts)


def reason(fault: Exception, uri: str | None = None) -> str:
    """The first line of what a library says, not too long, with `uri` as messages show it."""
    words = str(fault) if uri is None else str(fault).replace(uri, shown(uri))
    return next(iter(words.splitlines()), type(fault).__name__)[:_REASON]
