"""Sources and data sets at URIs: the same bytes as in folders, with jobs on machines that see neither the copies nor each other."""

import gzip
import pickle
import resource
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.fs
import pyarrow.parquet as pq
import pytest
from s3_server import BUCKET, S3Server, running

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare import prepare as prepare_module
from rec_dist.data.prepare.blockwise import scratch
from rec_dist.data.prepare.blockwise.driver import Sizes
from rec_dist.data.prepare.jobs import Jobs
from rec_dist.data.prepare.outcome import Prepared
from rec_dist.data.prepare.prepare import prepare
from rec_dist.data.sources import Source
from rec_dist.errors import DiskError, UserError
from rec_dist.storage.location import Location

SMALL = Sizes(block_bytes=2500, partition_rows=200, range_rows=150, num_bins=16)
ROWS = [(f"u{r % 23}", f"i{r * r % 31}", r // 3, 1 + r % 5) for r in range(400)]


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    with running() as started:
        yield started


def write_sources(folder: Path) -> None:
    """One catalogue as csv, as packed csv and as Parquet in two parts, and RecBole's pair of files."""
    text = "user,item,timestamp,rating\n" + "".join(f"{u},{i},{t},{r}\n" for u, i, t, r in ROWS)
    for name in ("csv", "packed", "parquet", "recbole"):
        (folder / name).mkdir(parents=True)
    (folder / "csv" / "log.csv").write_text(text)
    (folder / "packed" / "log.csv.gz").write_bytes(gzip.compress(text.encode(), mtime=0))
    users, items, times, ratings = (list(column) for column in zip(*ROWS, strict=True))
    table = pa.table({"user": users, "item": items, "timestamp": times, "rating": ratings})
    for part, begin in (("a", 0), ("b", 250)):
        pq.write_table(table.slice(begin, 250), folder / "parquet" / f"{part}.parquet", row_group_size=40)
    head = "user_id:token\titem_id:token\ttimestamp:float\trating:float\n"
    (folder / "recbole" / "log.inter").write_text(head + "".join(f"{u}\t{i}\t{t}\t{r}\n" for u, i, t, r in ROWS))
    names = "".join(f"i{i}\tFilm {i}\n" for i in range(31))
    (folder / "recbole" / "log.item").write_text("item_id:token\ttitle:token_seq\n" + names)


def elsewhere(cache: Path) -> Jobs:
    """Runs each job as on another machine: it is sent as bytes, and what the driver keeps in its cache is not there."""

    def run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
        for job in jobs:
            away = cache.with_name("away")
            cache.rename(away)
            try:
                sent_function, sent_job = pickle.loads(pickle.dumps((function, job)))
                result = sent_function(sent_job)
            finally:
                if cache.exists():  # the job made one of its own
                    assert [path for path in cache.rglob("*") if path.is_file()] == [], "it leaves nothing"
                    for path in sorted(cache.rglob("*"), reverse=True):
                        path.rmdir()
                    cache.rmdir()
                away.rename(cache)
            yield pickle.loads(pickle.dumps(result))

    return Jobs(run, one_machine=False)


@pytest.mark.parametrize(
    "source",
    [
        "csv/log.csv",
        pytest.param("packed", marks=pytest.mark.slow),
        pytest.param("parquet", marks=pytest.mark.slow),
        pytest.param("recbole/log.inter", marks=pytest.mark.slow),
    ],
)
def test_everything_at_uris_is_everything_in_folders(server: S3Server, tmp_path: Path, source: str) -> None:
    write_sources(tmp_path / "raw")
    prefix, cache = f"{tmp_path.name}/raw/{Path(source).parts[0]}", tmp_path / "cache"
    for path in (tmp_path / "raw" / Path(source).parts[0]).iterdir():
        server.write(f"{prefix}/{path.name}", path.read_bytes())
    settings = {"min_rating": 2.0, "min_user_interactions": 2, "num_shards": 3, "valid_fraction": 0.2, "test_fraction": 0.2}
    here = prepare(DataConfig(source=str(tmp_path / "raw" / source), path=str(tmp_path / "here"), **settings))
    uri = server.uri(f"{tmp_path.name}/there")
    there = DataConfig(
        source=server.uri(f"{tmp_path.name}/raw/{source}"), path=uri, prepare_on="ray", cache_dir=str(cache), **settings
    )
    manifest = prepare(there, ray_jobs=lambda: elsewhere(cache), sizes=SMALL)
    assert (manifest.files, manifest.fingerprint, manifest.counts) == (here.files, here.fingerprint, here.counts)
    assert manifest.source == f"s3://{BUCKET}/{tmp_path.name}/raw/{source}"
    for entry in here.files:
        assert server.read(f"{tmp_path.name}/there/{entry.name}") == (tmp_path / "here" / entry.name).read_bytes(), entry.name
    assert verify(uri) == []
    assert list(cache.iterdir()) == [], "copies and pieces are gone"
    found = server.files.get_file_info(pa.fs.FileSelector(f"{BUCKET}/{tmp_path.name}/there", recursive=True))
    assert {entry.base_name for entry in found} == {entry.name for entry in here.files} | {"manifest.json"}
    assert prepare(there, ray_jobs=lambda: pytest.fail("it is there already")) == manifest


def test_what_an_upload_that_was_cut_off_has_left_is_replaced(server: S3Server, tmp_path: Path) -> None:
    write_sources(tmp_path)
    for name in (
        "items.arrow",
        "train-00007-of-00009.arrow",
        "index-test.arrow",
        "test-00000-of-00002.arrow.tmp",
        "manifest.json.tmp",
    ):
        server.write(f"{tmp_path.name}/{name}", b"a part")
    uri = server.uri(tmp_path.name)
    config = DataConfig(source=str(tmp_path / "csv"), path=uri, cache_dir=str(tmp_path / "cache"), split="leave_one_out")
    manifest = prepare(config)
    assert verify(uri) == []
    assert server.names(tmp_path.name) == {entry.name for entry in manifest.files} | {"manifest.json"}


@pytest.mark.parametrize("changes", [{}, {"min_user_interactions": 3}])
def test_a_data_set_that_another_process_writes_meanwhile_is_not_replaced(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, changes: dict[str, Any]
) -> None:
    """It is kept if it is the same, and an error if it has other settings."""
    write_sources(tmp_path)
    config = DataConfig(
        source=str(tmp_path / "csv"), path=server.uri(tmp_path.name), cache_dir=str(tmp_path / "cache"), split="leave_one_out"
    )
    other = config.model_copy(update=changes)
    read = prepare_module.prepare_in_memory

    def after_another(source: Source, own: DataConfig, folder: Path) -> Prepared:
        monkeypatch.undo()
        prepare(other)
        return read(source, own, folder)

    monkeypatch.setattr(prepare_module, "prepare_in_memory", after_another)
    if other == config:
        assert prepare(config) == prepare(other)
    else:
        with pytest.raises(UserError, match=r"holds a data set of other settings or files"):
            prepare(config)
    assert prepare(other).fingerprint == Manifest.load(Location(config.path)).fingerprint
    assert verify(config.path) == []


def test_a_bad_row_is_named_by_its_uri(server: S3Server, tmp_path: Path) -> None:
    server.write(f"{tmp_path.name}/log.csv", b"user,item,timestamp\na,x,1\nb,y,soon\n")
    config = DataConfig(
        source=server.uri(f"{tmp_path.name}/log.csv"), path=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache")
    )
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/{tmp_path.name}/log\.csv:3: timestamp is not a number"):
        prepare(config)
    for place in ("log.tsv", "nothing/log.csv"):
        with pytest.raises(UserError, match=r"data\.source \(s3://.*\) is neither a file nor a folder that holds one"):
            prepare(config.model_copy(update={"source": server.uri(f"{tmp_path.name}/{place}")}))


def test_a_full_disk_under_a_copy_is_named(server: S3Server, tmp_path: Path) -> None:
    """The source's in data.cache_dir, and that of an intermediate file in the temporary folder."""
    write_sources(tmp_path)
    server.write(f"{tmp_path.name}/log.csv", (tmp_path / "csv" / "log.csv").read_bytes())
    config = DataConfig(source=server.uri(tmp_path.name), path=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    array = scratch.Work(server.uri(f"{tmp_path.name}-work"), "attempt") / "alive.npy"
    scratch.save_array(array, np.arange(1000))
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4000, limits[1]))
    try:
        with pytest.raises(DiskError, match=rf"^{tmp_path}/cache/source-.*: File too large"):
            prepare(config)
        with pytest.raises(DiskError, match=rf"^{tempfile.gettempdir()}/rec-dist-.*: File too large"):
            scratch.load_array(array)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_a_part_that_changes_while_the_next_one_is_copied_is_refused(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_sources(tmp_path)
    for path in (tmp_path / "parquet").iterdir():
        server.write(f"{tmp_path.name}/{path.name}", path.read_bytes())
    copied = Location.copy

    def change_first(self: Location, file: str, target: Path) -> str:
        if file == "b.parquet":
            server.write(f"{tmp_path.name}/a.parquet", (tmp_path / "parquet" / "b.parquet").read_bytes())
        return copied(self, file, target)

    monkeypatch.setattr(Location, "copy", change_first)
    config = DataConfig(source=server.uri(tmp_path.name), path=str(tmp_path / "out"), cache_dir=str(tmp_path / "cache"))
    with pytest.raises(UserError, match=rf"s3://{BUCKET}/{tmp_path.name}/a\.parquet changed while it was read"):
        prepare(config)


def test_what_a_killed_attempt_left_at_a_uri_goes_after_a_day(
    server: S3Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    uri = server.uri(tmp_path.name)
    for attempt in ("old", "young"):
        scratch.save_array(scratch.Work(uri, attempt) / "rows-0.npy", np.arange(3))
    scratch.drop_left_over(uri)
    assert scratch.load_array(scratch.Work(uri, "old") / "rows-0.npy").tolist() == [0, 1, 2]
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now + 90_000.0)
    scratch.drop_left_over(uri)
    assert scratch.find_array(scratch.Work(uri, "old") / "rows-0.npy") is None


def test_a_job_on_a_machine_without_the_folder_says_so(tmp_path: Path) -> None:
    """Four machines, a folder as data.path and no disk in common."""
    (tmp_path / "log.csv").write_text("user,item,timestamp\n" + "".join(f"u{r % 7},i{r % 5},{r}\n" for r in range(90)))
    config = DataConfig(source=str(tmp_path / "log.csv"), path=str(tmp_path / "out"), split="leave_one_out", prepare_on="ray")

    def run(function: Callable[[Any], Any], jobs: Sequence[Any]) -> Iterable[Any]:
        (work,) = tmp_path.glob(".out.*.work")
        work.rename(tmp_path / "only on the driver")
        return map(function, jobs)

    with pytest.raises(UserError, match=r"runs a job of prepare and has no folder .*out\..*work; set data.path to a URI"):
        prepare(config, ray_jobs=lambda: Jobs(run, one_machine=False), sizes=SMALL)
