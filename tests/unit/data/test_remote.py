"""Data in an object store: it reads as from a folder, is fetched once per node within the cache's limit, and faults are named."""

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from prepared_rows import Row, write_prepared
from s3_server import CREDENTIALS, S3Server

from rec_dist.cli import main
from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset import node_cache
from rec_dist.data.dataset.preferences import open_preferences
from rec_dist.data.dataset.prepared_data import PreparedData, SequenceSplit
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare.prepare import prepare
from rec_dist.errors import UnreachableError, UserError
from rec_dist.storage.files import fingerprint, json_text
from rec_dist.storage.location import Location

TITLES = [f"title {item}" for item in range(40)]
NUM_ROWS, NUM_SHARDS = 60, 24


@pytest.fixture(scope="module", autouse=True)
def _credentials() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        for name, value in CREDENTIALS.items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def server() -> Iterator[S3Server]:
    running = S3Server()
    yield running
    running.kill()


@pytest.fixture(scope="module")
def local(tmp_path_factory: pytest.TempPathFactory) -> PreparedData:
    rng = np.random.default_rng(3)

    def row(user: int) -> Row:
        items = rng.permutation(len(TITLES))[: rng.integers(2, 30)].tolist()
        return Row(user * 3, items, int(rng.integers(1, len(items))), rng.integers(0, len(TITLES), rng.integers(0, 4)).tolist())

    rows = {split: [row(user) for user in range(count)] for split, count in (("train", NUM_ROWS), ("valid", 4), ("test", 4))}
    return write_prepared(tmp_path_factory.mktemp("remote") / "data", rows, TITLES, num_shards=NUM_SHARDS)


@pytest.fixture
def put(server: S3Server, local: PreparedData, tmp_path: Path) -> Callable[[], str]:
    """Uploads the data set under a prefix for this test only and returns the prefix."""

    def upload() -> str:
        server.put(local.location.folder, tmp_path.name)
        return tmp_path.name

    return upload


def contents(split: SequenceSplit) -> list[object]:
    rows = range(len(split))
    about = [split.user_ids.tolist(), split.offsets.tolist(), split.first_target.tolist()]
    return [
        *about,
        *([split.items_of(r).tolist(), split.explicit_negatives_of(r).tolist(), split.shards.raw_user(r)] for r in rows),
    ]


def opened(server: S3Server, prefix: str, cache: Path, cache_bytes: int = 1 << 30) -> PreparedData:
    return PreparedData.open(server.uri(prefix), cache=str(cache), cache_bytes=cache_bytes)


def cached(cache: Path) -> dict[str, int]:
    return {path.stem: path.stat().st_size for path in (cache / "shards").glob("*.arrow")}


def test_remote_is_local(server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path) -> None:
    remote = opened(server, put(), tmp_path / "cache")
    assert (remote.titles, remote.raw_items, remote.categories) == (local.titles, local.raw_items, local.categories)
    assert remote.train_counts.tolist() == local.train_counts.tolist()
    for name in ("train", "valid", "test"):
        left, right = remote.split(name), local.split(name)
        assert contents(left) == contents(right)
        rows, counts = np.arange(len(left))[::-1].copy(), np.diff(left.offsets)[::-1].copy()
        assert left.take(rows, counts).tolist() == right.take(rows, counts).tolist()
    for entry in remote.manifest.files:
        if entry.rows:
            cached_file = tmp_path / "cache" / "shards" / f"{entry.sha256}.arrow"
            assert cached_file.read_bytes() == (local.location.folder / entry.name).read_bytes()
    assert "127.0.0.1" not in str(remote.location)


def test_only_the_shards_of_the_rows_asked_for_are_fetched(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    remote = opened(server, put(), tmp_path / "cache")
    split = remote.split("train")
    at_start = {remote.manifest.items.sha256, remote.manifest.splits["train"].index.sha256}
    assert set(cached(tmp_path / "cache")) == at_start, "to plan, no shard is needed"
    rows = np.asarray([0, NUM_ROWS - 1, 1])
    assert split.take(rows, np.ones(3, dtype=np.int64)).tolist() == [local.split("train").items_of(int(row))[0] for row in rows]
    shards = remote.manifest.splits["train"].shards
    assert set(cached(tmp_path / "cache")) == at_start | {shards[0].sha256, shards[-1].sha256}
    assert split.shards.num_open == 2


def test_the_cache_keeps_its_bound_and_lets_the_oldest_go(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    bound, cache = max(entry.bytes for entry in local.manifest.files), tmp_path / "cache"  # the index: about four shards
    split = opened(server, put(), cache, bound).split("train")
    expected, held = contents(local.split("train")), []
    rng = np.random.default_rng(0)
    for row in rng.integers(0, NUM_ROWS, 100).tolist():
        assert split.items_of(row).tolist() == expected[3 + row][0]
        held.append(sum(cached(cache).values()))
        assert split.shards.num_open <= 8, "what the cache let go is unmapped at the next fetch"
    assert max(held) <= bound
    assert contents(split) == expected
    shards = local.manifest.splits["train"].shards
    split.items_of(0)
    assert shards[0].sha256 in cached(cache), "just used"
    rows = np.arange(NUM_ROWS)
    assert split.take(rows, np.diff(split.offsets)).tolist() == [item for row in rows for item in expected[3 + row][0]]
    gone = split.shards.num_open - len({entry.sha256 for entry in shards} & set(cached(cache)))
    assert gone <= 12 < NUM_SHARDS - 4, "a step that needs every shard maps about eight at once beyond what the cache holds"
    assert sum(cached(cache).values()) <= bound


def test_a_file_larger_than_the_cache_says_which_key_to_raise(server: S3Server, put: Callable[[], str], tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match=r"data\.cache_bytes \(1000\) is smaller than s3://.*items\.arrow \(\d+ bytes\); raise it"
    ):
        opened(server, put(), tmp_path / "cache", 1000)


def test_processes_of_a_node_fetch_a_shard_once(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    """Four processes read all rows at once, with cache space for everything and for a third of it."""
    prefix = put()
    program = (
        "import sys; from rec_dist.data.dataset.prepared_data import PreparedData;"
        "split = PreparedData.open(sys.argv[1], cache=sys.argv[2], cache_bytes=int(sys.argv[3])).split('train');"
        "print(sum(int(split.items_of(row).sum()) * (row + 1) for row in range(len(split))))"
    )
    everything = sum(entry.bytes for entry in local.manifest.files)
    split = local.split("train")
    total = sum(int(split.items_of(row).sum()) * (row + 1) for row in range(len(split)))
    for bound in (1 << 30, everything // 3):
        cache = tmp_path / f"cache-{bound}"
        words = [sys.executable, "-c", program, server.uri(prefix), str(cache), str(bound)]
        started = [subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=dict(os.environ)) for _ in range(4)]
        assert [int(process.communicate(timeout=120)[0]) for process in started] == [total] * 4
        assert sum(cached(cache).values()) <= bound
        assert not list((cache / "shards").glob("*.tmp"))
        if bound > everything:
            assert {server.num_fetches(f"{prefix}/{entry.name}") for entry in local.manifest.splits["train"].shards} == {1}


def test_what_a_killed_download_left_is_no_hindrance(server: S3Server, put: Callable[[], str], tmp_path: Path) -> None:
    prefix, cache = put(), tmp_path / "cache"
    remote = opened(server, prefix, cache)
    entry = remote.manifest.splits["train"].shards[0]
    (cache / "shards" / f"{entry.sha256}.tmp").write_bytes(b"half of it")
    (cache / "shards" / f"{remote.manifest.items.sha256}.arrow").write_bytes(b"")  # a file that the disk lost
    assert len(opened(server, prefix, cache).split("train").items_of(0))
    assert not list((cache / "shards").glob("*.tmp"))


def test_threads_share_a_split(server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path) -> None:
    bound = max(entry.bytes for entry in local.manifest.files)
    split, expected = opened(server, put(), tmp_path / "cache", bound).split("train"), contents(local.split("train"))
    wrong: list[int] = []

    def read(seed: int) -> None:
        for row in np.random.default_rng(seed).permutation(NUM_ROWS).tolist():
            if split.items_of(row).tolist() != expected[3 + row][0]:
                wrong.append(row)

    threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == []


def test_a_flipped_bit_is_met_at_its_shard_and_named(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    prefix = put()
    name = local.manifest.splits["train"].shards[2].name
    content = bytearray(server.read(f"{prefix}/{name}"))
    content[len(content) // 2] ^= 4
    server.write(f"{prefix}/{name}", bytes(content))
    split = opened(server, prefix, tmp_path / "cache").split("train")
    assert len(split.items_of(0))
    with pytest.raises(UserError, match=rf"^s3://\S+/{name} has changed .*; remove"):
        split.items_of(sum(entry.rows for entry in local.manifest.splits["train"].shards[:2]))
    assert local.manifest.splits["train"].shards[2].sha256 not in cached(tmp_path / "cache")
    assert f"{prefix}/{name} has changed" in verify(server.uri(prefix))[0]


@pytest.mark.parametrize("change", ["missing", "truncated", "stray"])
def test_what_a_listing_shows_is_found_before_anything_is_read(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path, change: str
) -> None:
    prefix, name = put(), local.manifest.splits["train"].shards[1].name
    if change == "missing":
        server.delete(f"{prefix}/{name}")
    elif change == "truncated":
        server.write(f"{prefix}/{name}", server.read(f"{prefix}/{name}")[:-1])
    else:
        name = "train-00000-of-00009.arrow"
        server.write(f"{prefix}/{name}", b"")
    says = {"missing": "is missing", "truncated": r"has \d+ bytes, not \d+", "stray": "does not name this file"}[change]
    with pytest.raises(UserError, match=rf"is damaged, 1 fault.*{name}.*{says}"):
        opened(server, prefix, tmp_path / "cache")
    assert len(verify(server.uri(prefix))) == 1


def test_verify_says_whole_of_what_is_whole(server: S3Server, put: Callable[[], str], capsys: pytest.CaptureFixture[str]) -> None:
    prefix = put()
    assert verify(server.uri(prefix)) == []
    assert main(["verify", server.uri(prefix)]) == 0
    assert f"{prefix}: data set whole" in capsys.readouterr().err
    content = bytearray(server.read(f"{prefix}/items.arrow"))
    content[len(content) // 2] ^= 1
    server.write(f"{prefix}/items.arrow", bytes(content))
    assert main(["verify", server.uri(prefix)]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: s3://")
    assert f"{prefix}/items.arrow has changed" in error
    assert len(error.splitlines()) == 1


def flip(path: Path) -> None:
    """Changes one bit and keeps the size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(bytes(content))


@pytest.mark.parametrize("silent", [False, True], ids=["written over", "decayed on the disk"])
def test_damage_of_the_same_size_in_the_cache_is_found_and_fetched_again(
    server: S3Server,
    put: Callable[[], str],
    local: PreparedData,
    tmp_path: Path,
    silent: bool,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Decay changes no time stamp, so it is found when the machine has started again."""
    prefix, cache, entry = put(), tmp_path / "cache", local.manifest.splits["train"].shards[0]
    expected = contents(local.split("train"))
    assert contents(opened(server, prefix, cache).split("train")) == expected
    path = cache / "shards" / f"{entry.sha256}.arrow"
    flip(path)
    if silent:
        path.with_suffix(".lock").write_bytes(node_cache._mark(path, entry))
        monkeypatch.setattr(node_cache, "_boot", lambda: "the next one")
    before = server.num_fetches(f"{prefix}/{entry.name}")
    assert contents(opened(server, prefix, cache).split("train")) == expected
    assert server.num_fetches(f"{prefix}/{entry.name}") == before + 1
    assert f"{path} was damaged after it was fetched; it is fetched again" in caplog.text
    assert contents(opened(server, prefix, cache).split("train")) == expected
    assert server.num_fetches(f"{prefix}/{entry.name}") == before + 1, "once"


def test_a_file_of_this_machine_is_checked_once_a_boot(
    local: PreparedData, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy, cache = tmp_path / "data", tmp_path / "cache"
    shutil.copytree(local.location.folder, copy)
    long_ago = time.time() - 3600
    monkeypatch.setattr(node_cache, "_SETTLED_SECONDS", -1.0)  # a copy's ctime is now, whatever its mtime
    hashed: list[str] = []
    plain = node_cache.sha256
    monkeypatch.setattr(node_cache, "sha256", lambda path: hashed.append(path.name) or plain(path))
    for path in copy.iterdir():
        os.utime(path, (long_ago, long_ago))
    read = lambda: contents(PreparedData.open(str(copy), cache=str(cache)).split("train"))
    read()
    first = len(hashed)
    assert first > NUM_SHARDS
    read()
    assert len(hashed) == first
    monkeypatch.setattr(node_cache, "_boot", lambda: "the next one")
    read()
    assert len(hashed) == 2 * first
    flip(copy / local.manifest.splits["train"].shards[1].name)
    with pytest.raises(UserError, match=rf"{local.manifest.splits['train'].shards[1].name} has changed"):
        read()


@pytest.mark.parametrize("named", [False, True])
def test_verify_reads_the_cache_too(
    named: bool,
    server: S3Server,
    put: Callable[[], str],
    local: PreparedData,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    prefix = put()
    monkeypatch.setenv("REC_DIST_CACHE", str(tmp_path / ("other" if named else "cache")))
    own = str(tmp_path / "cache") if named else None  # data.cache_dir
    split = PreparedData.open(server.uri(prefix), cache=own).split("train")
    split.items_of(0)
    (path,) = (tmp_path / "cache").rglob(f"{local.manifest.splits['train'].shards[0].sha256}.arrow")
    flip(path)
    assert main(["verify", server.uri(prefix), *(["--cache-dir", own] if own else [])]) == 0
    said = capsys.readouterr().err
    assert f"WARNING: {path} has changed since it was written" in said and "removed from this node's cache" in said
    assert "data set whole" in said and not path.exists()
    assert main(["verify", str(tmp_path), "--cache-dir", str(tmp_path)]) == 2
    assert "--cache-dir" in capsys.readouterr().err


def test_a_lock_that_is_never_released_is_named(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    """Another process that hangs while it fetches."""
    entry, location = local.manifest.splits["train"].shards[0], Location(server.uri(put()))
    cache = node_cache.NodeCache(tmp_path / "cache", 1 << 30, locked_seconds=0.3)
    with cache.opened(location, entry):
        pass
    lock = tmp_path / "cache" / "shards" / f"{entry.sha256}.lock"
    program = (
        "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); sys.stdin.read()"
    )
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen([sys.executable, "-c", program, str(lock)], **pipes) as holder:  # type: ignore[call-overload]
        assert holder.stdout.readline() == b"held\n"
        says = rf"another process has held {lock} for 0\.3 s; .* name another data\.cache_dir"
        with pytest.raises(UserError, match=says), cache.opened(location, entry):
            pass
        holder.communicate()
    with cache.opened(location, entry) as path:
        assert path.is_file()


def test_a_server_that_goes_gives_one_error_that_says_so(put: Callable[[], str], local: PreparedData, tmp_path: Path) -> None:
    running = S3Server()
    try:
        split = PreparedData.open(running.put(local.location.folder, "p"), cache=str(tmp_path / "cache")).split("train")
        assert len(split.items_of(0))
    finally:
        running.kill()
    assert len(split.items_of(1)), "what was fetched is read on"
    name = local.manifest.splits["train"].shards[-1].name
    with pytest.raises(UnreachableError, match=rf"s3://rec-dist-tests/p/{name} cannot be read: .* run the same command again"):
        split.items_of(NUM_ROWS - 1)


@pytest.mark.parametrize(
    ("place", "says"),
    [
        ("s3://no-such-bucket/p?endpoint_override=127.0.0.1:{port}&scheme=http", "no-such-bucket/p.*manifest.json is missing"),
        ("s3://rec-dist-tests/nothing?endpoint_override=127.0.0.1:{port}&scheme=http", "nothing.*manifest.json is missing"),
        ("s3://rec-dist-tests/p?endpoint=x", "Unexpected query parameter"),
        (
            "s4://bucket/p",
            r"\(s4://bucket/p\) cannot be opened: .*s3, gs or hdfs; give a URI of these, or a folder",
        ),
        ("s3://name:secret@rec-dist-tests/p?wrong=1", r"data.path \(s3://rec-dist-tests/p\) has credentials"),
        ("s3://rec-dist-tests/p?secret_key=secret\n", r"cannot be opened: Cannot parse URI: 's3://rec-dist-tests/p'"),
        ("s3://rec-dist-tests/p q?secret_key=secret", r"cannot be opened: Cannot parse URI: 's3://rec-dist-tests/p q'"),
    ],
)
def test_a_place_that_holds_nothing_is_refused(server: S3Server, place: str, says: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=says) as caught:
        PreparedData.open(place.format(port=server.port), cache=str(tmp_path))
    assert "secret" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


def test_preference_rows_go_there_and_come_back(server: S3Server, tmp_path: Path) -> None:
    lines = [{"prompt": f"p{row}", "chosen": f"c{row}", "rejected": [f"r{row}"]} for row in range(1500)]
    (tmp_path / "rows.jsonl").write_text("\n".join(json.dumps(line) for line in lines))
    uri = server.uri(tmp_path.name)
    settings = {"source": str(tmp_path / "rows.jsonl"), "path": uri, "format": "preferences", "num_shards": 2}
    config = DataConfig(**settings, cache_dir=str(tmp_path / "cache"))
    manifest = prepare(config)
    assert prepare(config) == manifest
    assert verify(uri) == []
    data = open_preferences(config)
    assert [row.prompt for rows in data.rows() for row in rows] == [line["prompt"] for line in lines]
    with pytest.raises(UserError, match=r"data.cache_bytes \(1000\) is smaller than the preference rows at s3://"):
        open_preferences(config.model_copy(update={"cache_bytes": 1000}))


def test_a_manifest_whose_hash_is_a_path_removes_nothing(
    server: S3Server, put: Callable[[], str], local: PreparedData, tmp_path: Path
) -> None:
    """The cache names a file by its hash, and removes what a killed download has left under that name."""
    prefix = put()
    body = json.loads(server.read(f"{prefix}/manifest.json"))
    del body["checksum"]
    body["items"]["sha256"] = "../../canary"
    server.write(f"{prefix}/manifest.json", json_text({**body, "checksum": fingerprint(body)}).encode())
    (tmp_path / "canary.arrow").write_text("not yours")
    with pytest.raises(UserError, match=r"manifest.json.*64 hex digits of a SHA-256.*remove"):
        opened(server, prefix, tmp_path / "cache")
    assert (tmp_path / "canary.arrow").read_text() == "not yours"


def test_the_cache_makes_room_with_its_own_files_only(server: S3Server, put: Callable[[], str], tmp_path: Path) -> None:
    """data.cache_dir may name a folder that has other files in a folder `shards`."""
    foreign = tmp_path / "cache" / "shards" / "report.arrow"
    foreign.parent.mkdir(parents=True)
    foreign.write_bytes(b"x" * 100_000)
    data = opened(server, put(), tmp_path / "cache", cache_bytes=20_000)
    for row in range(len(data.split("train"))):
        data.split("train").items_of(row)
    assert foreign.is_file()
