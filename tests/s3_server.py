"""An S3 server for tests: moto's, in a process of its own, which a test may kill. It listens at the loopback, or at one address."""

import http.client
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from pyarrow import fs

BUCKET = "rec-dist-tests"
CREDENTIALS = {"AWS_ACCESS_KEY_ID": "test", "AWS_SECRET_ACCESS_KEY": "test", "AWS_EC2_METADATA_DISABLED": "true"}


class S3Server:
    """Starts at once, with an empty bucket. The environment must hold CREDENTIALS."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        with socket.socket() as probe:
            probe.bind((host, 0))
            self.port = probe.getsockname()[1]
        self.host = host
        self._log = tempfile.NamedTemporaryFile(prefix="s3-server-")  # noqa: SIM115 - open as long as the server
        words = [sys.executable, "-m", "moto.server", "-H", host, "-p", str(self.port)]
        self._process = subprocess.Popen(words, stdout=self._log, stderr=self._log)
        self._wait()
        self.files = fs.S3FileSystem(
            endpoint_override=f"{host}:{self.port}", scheme="http", region="us-east-1", allow_bucket_creation=True
        )
        self.files.create_dir(BUCKET)

    def _wait(self) -> None:
        end = time.monotonic() + 60
        while time.monotonic() < end:
            try:
                socket.create_connection((self.host, self.port), 1).close()
                return
            except OSError:
                assert self._process.poll() is None, "the server ended at its start"
                time.sleep(0.05)
        raise TimeoutError("the server did not come up")

    def uri(self, prefix: str) -> str:
        """The data.path of the objects under `prefix`."""
        return f"s3://{BUCKET}/{prefix}?endpoint_override={self.host}:{self.port}&scheme=http&region=us-east-1"

    def put(self, folder: Path, prefix: str) -> str:
        """Uploads the files of `folder` and returns their URI."""
        for path in folder.iterdir():
            self.write(f"{prefix}/{path.name}", path.read_bytes())
        return self.uri(prefix)

    def write(self, name: str, content: bytes) -> None:
        """Writes one object."""
        with self.files.open_output_stream(f"{BUCKET}/{name}") as sink:
            sink.write(content)

    def write_key(self, key: str, content: bytes) -> None:
        """Writes an object whose key is not a valid path: pyarrow rejects such keys."""
        link = http.client.HTTPConnection(self.host, self.port)
        link.putrequest("PUT", f"/{BUCKET}/{key}")
        link.putheader("Authorization", "AWS test:x")
        link.putheader("Content-Length", str(len(content)))
        link.endheaders(content)
        assert link.getresponse().status == 200
        link.close()

    def read(self, name: str) -> bytes:
        """Reads one object."""
        with self.files.open_input_stream(f"{BUCKET}/{name}") as stream:
            return bytes(stream.read())

    def delete(self, name: str) -> None:
        """Removes one object."""
        self.files.delete_file(f"{BUCKET}/{name}")

    def names(self, prefix: str) -> set[str]:
        """The names, below `prefix`, of all objects there."""
        place = f"{BUCKET}/{prefix}"
        found = self.files.get_file_info(fs.FileSelector(place, recursive=True, allow_not_found=True))
        return {entry.path.removeprefix(f"{place}/") for entry in found if entry.is_file}

    def clients(self, prefix: str) -> set[str]:
        """The addresses that have read or written objects whose names begin with `prefix` so far."""
        lines = Path(self._log.name).read_text(encoding="utf-8").splitlines()
        return {line.split()[0] for line in lines if f" /{BUCKET}/{prefix}" in line}

    def num_fetches(self, name: str) -> int:
        """How often an object's bytes have been requested so far."""
        return Path(self._log.name).read_text(encoding="utf-8").count(f"GET /{BUCKET}/{name} ")

    def kill(self) -> None:
        """Kills the server, as a crash would."""
        self._process.kill()
        self._process.wait()
        self._log.close()


@contextmanager
def running(host: str = "127.0.0.1") -> Iterator[S3Server]:
    """A server inside the block, with CREDENTIALS in this process's environment."""
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        server = S3Server(host)
        try:
            yield server
        finally:
            server.kill()
