"""`rec-dist prepare`: raw files or tables -> the prepared data set, here or in an object store, on Ray where it is large."""

from typing import Any

from rec_dist.config.schema import RunConfig
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.prepared_data import cache_folder
from rec_dist.data.prepare.prepare import prepare as prepare_data
from rec_dist.data.sources import write_tables
from rec_dist.errors import UserError
from rec_dist.launch.prepare_on_ray import ray_jobs
from rec_dist.storage.temporary import temporary_folder


def prepare(config: RunConfig, *, interactions: Any = None, items: Any = None) -> Manifest:
    """Writes the prepared data set to data.path and returns its manifest; keeps the one that is already there.

    interactions, items: pandas or Arrow tables in place of data.source, as write_tables takes them.
    Raises UserError for sources or tables that cannot be read, and for a folder at data.path that holds something else.
    """
    data = config.data
    if interactions is None:
        if items is not None:
            raise UserError("items describes the items of interactions, which is missing; pass both, or set data.source")
        return prepare_data(data, ray_jobs=lambda: ray_jobs(config.cluster))
    if data.format not in ("auto", "parquet"):
        raise UserError(f"data.format ({data.format}) says how to read files, and interactions is a table; remove data.format")
    if data.prepare_on == "ray":
        raise UserError("data.prepare_on=ray reads files, and interactions is a table; set data.prepare_on=auto, memory or disk")
    with temporary_folder(cache_folder(data.cache_dir), "tables-") as folder:
        tables = write_tables(interactions, items, data.columns, folder)
        return prepare_data(data.model_copy(update={"source": "tables", "columns": {}}), tables=tables)
