"""Computes the parts of `rec-dist embed` on Ray Data: one actor a worker, each with the whole model, and one row a part.

It takes actors rather than tasks because an actor loads the model once for many parts. Ray Data repeats the parts of a lost
worker, which is safe because a part's file is whole or absent. Cost: 20-30 s to start Ray here, and loading the model on each
worker.
"""

from collections.abc import Iterator, Sequence
from typing import Any

from rec_dist.config.schema import ClusterConfig
from rec_dist.launch import ray_cluster
from rec_dist.launch.ray_data import SHOWN, fault_columns, raise_fault, ray_data
from rec_dist.launch.sizing import size_workers
from rec_dist.methods.language_model.embedding import Embedder, EmbedJob
from rec_dist.runtime.quiet import quieten


class _Actor:
    """Loads the model at the first part, so that an error in loading comes back as a row."""

    def __init__(self, job: EmbedJob, device: str) -> None:
        quieten()
        self._job, self._device = job, device
        self._embedder: Embedder | None = None

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        try:
            if self._embedder is None:
                self._embedder = Embedder(self._job, self._device)
            self._embedder.write(int(row["part"]))
        except SHOWN as fault:
            return {"part": row["part"], **fault_columns(fault)}
        return {"part": row["part"], **fault_columns(None)}


def write_parts(job: EmbedJob, parts: Sequence[int], cluster: ClusterConfig) -> Iterator[int]:
    """Writes `parts` and yields each once it is written, in any order.

    Raises what a worker raised of SHOWN, or UserError when the cluster is too small.
    """
    data = ray_data(cluster, ordered=False)
    size = size_workers(cluster, ray_cluster.nodes(asked=False))
    share = {"num_gpus": 1} if size.use_gpu else {"num_cpus": size.cpus}
    rows = data.from_items([{"part": part} for part in parts], override_num_blocks=len(parts)).map(
        _Actor,
        fn_constructor_args=(job, "cuda:0" if size.use_gpu else "cpu"),
        compute=data.ActorPoolStrategy(size=min(size.num_workers, len(parts))),
        **share,
    )
    for row in rows.iter_rows():
        raise_fault(row)
        yield int(row["part"])
