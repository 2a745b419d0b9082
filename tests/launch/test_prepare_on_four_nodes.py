"""`rec-dist prepare` and `rec-dist rank` on four Ray nodes that share nothing but an S3 server. About two minutes.

The nodes are namespaces of this machine, each with its own address, processes, /tmp and home (namespaces.py, own_disk). Source and
data set are at s3://, on a server that all nodes reach over the network. A job that looks for a file of another machine fails here,
as it would on a cluster without shared storage.
"""

import gzip
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import yaml
from finished_runs import finished_run
from namespaces import WORK, available
from ray_nodes import RayNodes
from s3_server import BUCKET, CREDENTIALS, S3Server, running
from slow_ranking import RANK_SLOWLY

from rec_dist.cli import main
from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.verify import verify
from rec_dist.data.prepare.prepare import prepare
from rec_dist.storage.location import Location

pytestmark = [pytest.mark.launch, pytest.mark.skipif(not available(), reason="needs root and network namespaces (iproute2)")]

_NODES = 4
_SETTINGS = {"min_rating": 2.0, "min_user_interactions": 2, "num_shards": 5, "split": "global_temporal"}
# The command with pieces that a small source has several of: sys.argv[1] is the number of bytes of a block of the source, and
# sys.argv[2] that of rows of a hash partition.
_PREPARE = """
import sys
from rec_dist.cli import main
from rec_dist.data.prepare import prepare
from rec_dist.data.prepare.blockwise.driver import Sizes
block_bytes, rows = map(int, sys.argv[1:3])
prepare.Sizes = lambda: Sizes(block_bytes, rows, range_rows=rows, num_bins=64)
sys.exit(main(["prepare", *sys.argv[3:]]))
"""


def csv_rows(*, bad: int | None = None) -> bytes:
    """5,000 rows with ties in time and titles that hold quotes and line ends. bad: the row, from 0, with a text as its rating."""
    rows = ["user,item,timestamp,rating,title"]
    for row in range(5000):
        item = row * row % 97
        title = f'"The ""{item}""\nfilm"' if item % 5 == 0 else f"Film {item}"
        rows.append(f"u{row * 31 % 211},i{item},{row // 40},{'x' if row == bad else 1 + row % 5},{title}")
    return "\n".join(rows).encode() + b"\n"


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with RayNodes.opened(_NODES, own_disks=True, PYTHONPATH=python_path(), **CREDENTIALS) as opened:
        yield opened


@pytest.fixture(scope="module")
def server(nodes: RayNodes) -> Iterator[S3Server]:
    with running(nodes.network.gateway) as started:
        started.write("raw/log.csv", csv_rows())
        started.write("packed/log.csv.gz", gzip.compress(csv_rows(), mtime=0))
        yield started


def python_path() -> str:
    root = Path(__file__).parents[2]
    assert not root.is_relative_to("/tmp"), "the nodes have a /tmp of their own"
    return f"{root}:{root / 'kernels'}"


def rec_dist(nodes: RayNodes, code: str, *words: object) -> subprocess.CompletedProcess[bytes]:
    """Runs a command on node 0, with the cluster's other nodes as its workers."""
    return nodes.run(0, "python", "-P", "-c", code, *map(str, words), PYTHONPATH=python_path(), **CREDENTIALS)


def prepared(
    nodes: RayNodes, server: S3Server, source: str, target: str, partition_rows: int, block_bytes: int = 20_000
) -> tuple[str, int, str]:
    """(the data set's URI, the command's exit code, what it said)."""
    uri = server.uri(target)
    data = {"source": server.uri(source), "path": uri, "prepare_on": "ray", "cache_dir": f"{WORK}/cache", **_SETTINGS}
    config = yaml.safe_dump({"data": data, "train": {"run_dir": f"{WORK}/run"}})
    assert nodes.run(0, "sh", "-c", f"cat > {WORK}/config.yaml", sent=config.encode()).returncode == 0
    done = rec_dist(nodes, _PREPARE, block_bytes, partition_rows, f"{WORK}/config.yaml")
    return uri, done.returncode, done.stderr.decode()


def left_on(nodes: RayNodes) -> list[str]:
    """What prepare has left in the nodes' caches and temporary folders."""
    find = f"find {WORK}/cache /tmp -maxdepth 1 -name 'source-*' -o -maxdepth 1 -name 'shard-*' -o -maxdepth 1 -name 'rec-dist-*'"
    return [line for host in range(_NODES) for line in nodes.run(host, "sh", "-c", find).stdout.decode().splitlines()]


def test_four_nodes_without_a_common_disk_write_the_bytes_of_one_and_of_memory(
    nodes: RayNodes, server: S3Server, tmp_path: Path
) -> None:
    (tmp_path / "log.csv").write_bytes(csv_rows())
    memory = prepare(DataConfig(source=str(tmp_path / "log.csv"), path=str(tmp_path / "memory"), **_SETTINGS))

    def check(source: str, target: str, partition_rows: int, partitions: int) -> Manifest:
        uri, code, said = prepared(nodes, server, source, target, partition_rows)
        assert code == 0, said
        assert f"prepare, order: {partitions} jobs" in said
        assert server.names(target) == {entry.name for entry in memory.files} | {"manifest.json"}
        for entry in memory.files:
            assert server.read(f"{target}/{entry.name}") == (tmp_path / "memory" / entry.name).read_bytes(), entry.name
        assert verify(uri) == []
        return Manifest.load(Location(uri))

    nodes.join(1)
    one = check("raw", "one", 900, 5)
    assert server.clients("one/") == {nodes.network.address(0), nodes.network.gateway}
    assert server.clients("one/.work-") == {nodes.network.address(0)}, "others might have joined meanwhile"
    nodes.join(_NODES)
    nine = check("raw", "four", 900, 5)
    few = check("packed/log.csv.gz", "packed-four", 2500, 2)
    assert (one.fingerprint, nine.fingerprint) == (memory.fingerprint, memory.fingerprint)
    assert one.counts == nine.counts == few.counts == memory.counts
    everyone = {nodes.network.address(host) for host in range(_NODES)}
    assert everyone <= server.clients("four/") | server.clients("packed-four/"), "every node has worked"
    assert left_on(nodes) == []


def test_a_bad_row_on_another_machine_is_named_by_its_uri_and_line(nodes: RayNodes, server: S3Server) -> None:
    nodes.join(_NODES)
    text = csv_rows(bad=4321)
    server.write("bad/log.csv.gz", gzip.compress(text))
    line = text[: text.index(b",x,")].count(b"\n") + 1
    _, code, said = prepared(nodes, server, "bad", "never", 900)
    assert code == 2, said
    assert f"s3://{BUCKET}/bad/log.csv.gz:{line}: rating is not a number ('x'), 1 of this kind" in said.splitlines()[-1]
    assert server.names("never") == set()
    assert left_on(nodes) == []


def test_jobs_that_are_left_when_one_fails_write_nothing_any_more(nodes: RayNodes, server: S3Server) -> None:
    """The first of 60 jobs finds a byte that is not UTF-8."""
    nodes.join(_NODES)
    first, second, rest = csv_rows().split(b"\n", 2)
    server.write("broken/log.csv", b"\n".join([first, second, b"\xff,i1,1,1,x", rest]))
    _, code, said = prepared(nodes, server, "broken", "never", 900, block_bytes=2000)
    assert code == 2, said
    assert f"s3://{BUCKET}/broken/log.csv:3: this line is not UTF8 text" in said.splitlines()[-1]
    time.sleep(5.0)
    assert server.names("never") == set()


def test_a_folder_that_only_one_machine_has_is_one_line(nodes: RayNodes, server: S3Server) -> None:
    nodes.join(_NODES)
    assert nodes.run(0, "sh", "-c", f"cat > {WORK}/log.csv", sent=csv_rows()).returncode == 0
    data = {"path": server.uri("local"), "prepare_on": "ray", "cache_dir": f"{WORK}/cache", **_SETTINGS}
    for source, path in ((f"{WORK}/log.csv", server.uri("local")), (server.uri("raw"), f"{WORK}/out")):
        config = yaml.safe_dump({"data": {**data, "source": source, "path": path}, "train": {"run_dir": f"{WORK}/run"}})
        assert nodes.run(0, "sh", "-c", f"cat > {WORK}/config.yaml", sent=config.encode()).returncode == 0
        done = rec_dist(nodes, _PREPARE, 20_000, 900, f"{WORK}/config.yaml")
        said = done.stderr.decode()
        assert (done.returncode, "Traceback" in said) == (2, False), said
        assert "a URI (s3://bucket/prefix), or" in said.splitlines()[-1]
    assert server.names("local") == set()
    assert nodes.run(0, "ls", "-A", WORK).stdout.decode().split() == ["cache", "config.yaml", "log.csv"]


def test_ranking_reads_the_data_set_from_the_store(nodes: RayNodes, server: S3Server, tmp_path: Path) -> None:
    """The run itself is a folder, which each machine has a copy of."""
    nodes.join(_NODES)
    run = finished_run(tmp_path / "made")
    words = ["--top-k", "3", f"data.path={server.put(tmp_path / 'made' / 'data', 'ranked')}"]
    assert main(["rank", str(run), *words, f"data.cache_dir={tmp_path / 'cache'}", "--out", str(tmp_path / "here.parquet")]) == 0
    for host in range(_NODES):
        nodes.copy(run, host, "run")
    on_ray = ["--launcher", "ray", f"cluster.num_workers={_NODES}", "cluster.cpus_per_worker=1", "cluster.use_gpu=false"]
    words += [f"data.cache_dir={WORK}/cache", *on_ray, "--out", f"{WORK}/there.parquet"]
    done = rec_dist(nodes, RANK_SLOWLY, 5.0, "rank", f"{WORK}/run", *words)  # so that the first worker does not do all blocks
    assert done.returncode == 0, done.stderr.decode()
    assert nodes.run(0, "cat", f"{WORK}/there.parquet").stdout == (tmp_path / "here.parquet").read_bytes()
    others = {nodes.network.address(host) for host in range(1, _NODES)}
    assert others & server.clients("ranked/"), "not only the machine of the command has worked"
