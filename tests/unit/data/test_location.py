"""Locations: which URIs are accepted, how long a store may be silent, and messages about local folders."""

import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from pyarrow import fs
from s3_server import CREDENTIALS

from rec_dist.cli import main
from rec_dist.errors import UserError
from rec_dist.storage.location import Location


@pytest.fixture
def silent() -> Iterator[int]:
    """The port of a server that accepts every connection and never answers."""
    held: list[socket.socket] = []
    with socket.create_server(("127.0.0.1", 0)) as server:

        def accept() -> None:
            while True:
                try:
                    held.append(server.accept()[0])
                except OSError:
                    return

        thread = threading.Thread(target=accept, daemon=True)
        thread.start()
        yield server.getsockname()[1]
        server.shutdown(socket.SHUT_RDWR)
        thread.join()
    for connection in held:
        connection.close()


@pytest.mark.parametrize(
    "uri", ["mock://x", "abfs://account@container/x", "local:///tmp", "viewfs://x/y", "gcs://b/x", "S3://b/x"]
)
def test_other_schemes_are_refused(uri: str) -> None:
    with pytest.raises(UserError, match=r"cannot be opened: .*s3, gs or hdfs; give a URI of these, or a folder"):
        Location(uri)


@pytest.mark.slow
def test_a_store_that_never_answers_is_given_up(
    silent: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Five attempts of 6 s each, with pauses; with pyarrow's own limits it would take 99 s."""
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    began = time.monotonic()
    assert main(["status", f"s3://bucket/x?endpoint_override=127.0.0.1:{silent}&scheme=http&region=us-east-1"]) == 2
    assert 20 < time.monotonic() - began < 55
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: checkpoint.remote (s3://bucket/x) cannot be listed")
    assert "check the address, the credentials and the network" in line


def test_the_options_of_a_uri_stand_beside_the_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in CREDENTIALS.items():
        monkeypatch.setenv(name, value)
    place = "s3://bucket/x?endpoint_override=host:9&scheme=http&region=eu-west-3&allow_bucket_creation=true"
    system = Location(place)._system
    (options,) = system.__reduce__()[1]
    plain = fs.FileSystem.from_uri(place)[0].__reduce__()[1][0]
    assert {key for key in plain if options[key] != plain[key]} == {"connect_timeout", "request_timeout"}
    assert (options["endpoint_override"], options["region"], options["allow_bucket_creation"]) == ("host:9", "eu-west-3", True)


@pytest.mark.parametrize(("uri", "seconds"), [("gs://anonymous@b/x", 15), ("gs://anonymous@b/x?retry_limit_seconds=90", 90)])
def test_the_retries_of_google_end_early_unless_the_uri_says_when(uri: str, seconds: int) -> None:
    (options,) = Location(uri)._system.__reduce__()[1]
    assert options["retry_time_limit"].total_seconds() == seconds
    assert options["anonymous"]


def test_a_folder_in_the_way_of_a_file_says_so_and_nothing_of_credentials(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    (tmp_path / "place" / "taken").mkdir(parents=True)
    location = Location(tmp_path / "place", key="checkpoint.remote")
    attempts = [
        lambda: location.write(tmp_path / "file", "taken"),
        lambda: location.read("taken"),
        lambda: location.remove("taken"),
    ]
    for attempt in attempts:
        with pytest.raises(
            UserError, match=r"^checkpoint\.remote: .*/place/taken cannot be \w+: .*see that the folder can be"
        ) as caught:
            attempt()
        assert "credentials" not in str(caught.value)
