"""`rec-dist prepare`: raw files to the prepared data set, here or in an object store, on Ray where it is large."""

from collections.abc import Callable

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.prepare.prepare import prepare as prepare_data
from rec_dist.data.prepare.upload import prepare_remote
from rec_dist.launch.prepare_on_ray import ray_map
from rec_dist.storage.uri import is_remote


def prepare(config: RunConfig, *, log: Callable[[str], None]) -> Manifest:
    """Raw files -> the prepared data set at data.path; kept when it is there already."""
    place = prepare_remote if is_remote(config.data.path) else prepare_data
    return place(config.data, log=log, ray_map=lambda: ray_map(config.cluster.address))
