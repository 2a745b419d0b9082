"""Where a prepared data set or the copy of a run lies: a folder here, or one of an object store or file system that pyarrow knows.

`s3://bucket/prefix`, `gs://bucket/prefix` and `hdfs://host:port/path`, with the options that pyarrow takes behind a question mark
(`?endpoint_override=host:9000&scheme=http`). Credentials come from where the store's own tools look for them; those written into
a URI work and are never shown.
"""

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow import fs

from rec_dist.runtime.errors import UnreachableError, UserError
from rec_dist.runtime.files import is_remote

_CHUNK_BYTES = 16 << 20  # one request of an object store; at 4 MiB its latency would show
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
        """UserError: a scheme that pyarrow does not know, or a file system that cannot be opened."""
        text, self._key = str(path), key
        self.is_remote = is_remote(text)
        if not self.is_remote:
            self.folder = Path(text.removeprefix("file://")).expanduser().absolute()
            self._system, self._base, self._shown = fs.LocalFileSystem(), str(self.folder), str(self.folder)
            return
        scheme, rest = text.split("://", 1)
        self._shown = f"{scheme}://{rest.split('?')[0].rpartition('@')[2].rstrip('/')}"
        try:
            self._system, base = fs.FileSystem.from_uri(text)
        except (OSError, ValueError, pa.ArrowException) as fault:
            raise UserError(f"{key} ({self._shown}) cannot be opened: {reason(fault)}; {_WAY_OUT}") from None
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
            raise UserError(f"{self._key}: {self.name(file)} cannot be read: {reason(fault)}; {_WAY_OUT}") from None

    def sizes(self) -> dict[str, int]:
        """Bytes of each file of this folder by its name. UserError: it cannot be listed."""
        try:
            found = self._system.get_file_info(fs.FileSelector(self._base, allow_not_found=True))
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key} ({self}) cannot be listed: {reason(fault)}; {_WAY_OUT}") from None
        return {entry.base_name: entry.size for entry in found if entry.type == fs.FileType.File}

    def tree(self) -> dict[str, Stored]:
        """Every file below this folder by its path from here. UserError: it cannot be listed."""
        try:
            found = self._system.get_file_info(fs.FileSelector(self._base, allow_not_found=True, recursive=True))
        except (OSError, pa.ArrowException) as fault:
            raise UserError(f"{self._key} ({self}) cannot be listed: {reason(fault)}; {_WAY_OUT}") from None
        files = [entry for entry in found if entry.type == fs.FileType.File]
        return {entry.path.removeprefix(f"{self._base}/"): Stored(entry.size, (entry.mtime_ns or 0) / 1e9) for entry in files}

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
                raise UserError(f"{self._key}: {self.name(file)} cannot be written: {reason(fault)}; {_WAY_OUT}") from None

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
            raise UserError(f"{self._key}: {self.name(file)} cannot be removed: {reason(fault)}; {_WAY_OUT}") from None

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
        return UnreachableError(
            f"{self.name(file)} cannot be read: {reason(fault)}; see that the store answers and run the same command again"
        )


_OBJECT_STORES = ("s3", "gcs")  # an object is there once its stream is closed; no folders need be made
REMEDY = "remove the data set and run `rec-dist prepare CONFIG` again"
_WAY_OUT = "check the address, the credentials and the network"


def reason(fault: Exception) -> str:
    """The first line of what a library says, not too long."""
    return next(iter(str(fault).splitlines()), type(fault).__name__)[:_REASON]
