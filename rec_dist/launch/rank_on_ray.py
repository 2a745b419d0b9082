"""Ranks blocks of users on Ray Data: users as a dataset of one Ray block a block, mapped by actors that hold the model.

Ray Data's writers know no parts that a later command continues, so only scoring is theirs: it streams the results back in the
order of the users, and the command writes them as it writes its own. A block is scored whole by one actor, so its scores are those
of one machine. Ray Data repeats the blocks of a lost worker.

Cost: 20-30 s to start Ray here, and loading the model on each worker. All users are read at the start into Ray's object store,
which goes on to disk when it is full: 4 bytes an item of histories and lists of candidates.
"""

import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.data.artifacts.recommendations import RecordBatch
from rec_dist.data.artifacts.user_blocks import TravellingUsers, batch_of, bytes_of, table_of_users, users_of_table
from rec_dist.errors import WorkerFailedError
from rec_dist.launch import ray_cluster
from rec_dist.launch.ray_data import SHOWN, fault_columns, raise_fault, ray_data
from rec_dist.launch.sizing import size_workers
from rec_dist.ranking.rank import Counts
from rec_dist.runtime.limits import each_within
from rec_dist.runtime.quiet import quieten

Rank = Callable[[TravellingUsers], tuple[RecordBatch, Counts]]
Load = Callable[[str], AbstractContextManager[Rank]]  # the device -> what ranks a block


class _Actor:
    """Loads the model at the first block, so that an error in loading comes back as a row."""

    def __init__(self, load: Load, device: str) -> None:
        quieten()
        self._load, self._device, self._held = load, device, ExitStack()
        self._rank: Rank | None = None

    def __call__(self, table: Any) -> dict[str, list[Any]]:
        block = users_of_table(table)
        try:
            if self._rank is None:
                self._rank = self._held.enter_context(self._load(self._device))
            batch, counts = self._rank(block)
        except SHOWN as fault:
            return _row(block.number, b"", {}, fault)
        return _row(block.number, bytes_of(batch), vars(counts), None)


def _row(block: int, lists: bytes, counts: dict[str, int], fault: BaseException | None) -> dict[str, list[Any]]:
    row = {"block": block, "lists": lists, "counts": json.dumps(counts), **fault_columns(fault)}
    return {name: [value] for name, value in row.items()}


def ranked_on_ray(load: Load, blocks: Iterable[TravellingUsers], cluster: ClusterConfig) -> Iterator[tuple[RecordBatch, Counts]]:
    """The lists of each block, in the order of the blocks, whose numbers count from 0.

    Raises what a worker raised of SHOWN, UserError when the cluster is too small, and WorkerFailedError when no block ends for
    cluster.hang_seconds.
    """
    data = ray_data(cluster, ordered=True)
    import ray

    size = size_workers(cluster, ray_cluster.nodes(asked=False))
    share = {"num_gpus": 1} if size.use_gpu else {"num_cpus": size.cpus}
    tables = [ray.put(table_of_users(block)) for block in blocks]
    if not tables:
        return
    rows = data.from_arrow_refs(tables).map_batches(
        _Actor,
        fn_constructor_args=(load, "cuda:0" if size.use_gpu else "cpu"),
        batch_size=None,
        batch_format="pyarrow",
        compute=data.ActorPoolStrategy(size=min(size.num_workers, len(tables))),
        **share,
    )
    expected = 0
    try:
        for row in each_within(cluster.hang_seconds, iter(rows.iter_rows())):
            raise_fault(row)
            assert row["block"] == expected, f"block {row['block']} came in the place of block {expected}"
            expected += 1
            yield batch_of(row["lists"]), Counts(**json.loads(row["counts"]))
    except TimeoutError as fault:
        raise WorkerFailedError(f"hang: a block of users on Ray: {fault}; run the same command again") from fault
    assert expected == len(tables), f"{len(tables) - expected} blocks are missing"
