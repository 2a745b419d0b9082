"""A store that refuses requests while `prepare` uses it: the line says that the store fails, and nothing else."""

from collections.abc import Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from loopback import loopback
from s3_server import CREDENTIALS

from rec_dist.data.prepare.blockwise.scratch import Work
from rec_dist.data.sources.blocks import Block
from rec_dist.data.sources.parquet import ParquetRows
from rec_dist.data.sources.roles import Roles
from rec_dist.errors import UnreachableError, UserError
from rec_dist.runtime.messages import messages_to


@contextmanager
def store(content: bytes, answers: int, reads: list[str] | None = None) -> Iterator[str]:
    """The URI of a folder in which every file has this content. It refuses reads after so many, which it appends to `reads`."""

    class Store(BaseHTTPRequestHandler):
        left = answers

        def do_HEAD(self) -> None:
            self.answer(200, len(content), b"")

        def do_GET(self) -> None:
            if Store.left == 0:
                self.refuse()
                return
            Store.left -= 1
            if reads is not None:
                reads.append(self.path)
            begin, _, end = self.headers["Range"].removeprefix("bytes=").partition("-")
            part = content[int(begin) : int(end) + 1]
            self.answer(206, len(part), part)

        def refuse(self) -> None:
            self.answer(403, 0, b"")

        def do_POST(self) -> None:
            self.refuse()

        def do_DELETE(self) -> None:
            self.refuse()

        def answer(self, code: int, size: int, body: bytes) -> None:
            self.send_response(code)
            self.send_header("Content-Length", str(size))
            self.send_header("Last-Modified", formatdate(0, usegmt=True))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with pytest.MonkeyPatch.context() as patch, loopback(Store) as address:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield f"s3://bucket/raw?endpoint_override={address.removeprefix('http://')}&scheme=http&region=us-east-1"


def parquet(path: Path) -> bytes:
    pq.write_table(pa.table({"user": ["a", "b"] * 50, "item": list(range(100))}), path, row_group_size=10)
    return path.read_bytes()


def num_rows(uri: str) -> int:
    block = Block(0, Path("copy/log.parquet"), Path("/nowhere/log.parquet"), 0, None, (uri, "log.parquet"))
    return len(ParquetRows(Roles("user", "item")).read(block, None))


def test_a_store_that_fails_under_parquet_is_not_a_damaged_file(tmp_path: Path) -> None:
    content, reads = parquet(tmp_path / "log.parquet"), list[str]()
    with store(content, 1000, reads) as uri:
        assert num_rows(uri) == 100
    for answers in (0, len(reads) // 2, len(reads) - 1):
        with (
            store(content, answers) as uri,
            pytest.raises(UnreachableError, match=r"^s3://bucket/raw/log\.parquet cannot be read"),
        ):
            num_rows(uri)
    damaged = bytearray(content)
    damaged[4:60] = bytes(56)  # the first page
    with (
        store(bytes(damaged), answers=1000) as uri,
        pytest.raises(UserError, match=r"copy/log\.parquet cannot be read .*write the"),
    ):
        num_rows(uri)


def test_work_that_cannot_be_removed_is_a_warning() -> None:
    """What ended the attempt is the error."""
    lines: list[str] = []
    with store(b"", answers=0) as uri, messages_to(lines.append):
        Work(uri, "attempt").remove()
    assert len(lines) == 1
    assert "s3://bucket/raw/.work-attempt cannot be removed" in lines[0]
