"""The elements of an array job: each the configuration with its overrides, a run directory and a mirror of its own."""

from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

from rec_dist.config.load import load_config
from rec_dist.errors import UserError
from rec_dist.submit.job import Job, build_job, override

_OWN = ("train.run_dir", "checkpoint.remote")  # what two runs cannot share


def elements_of(job: Job, path: Path, overrides: Sequence[str]) -> list[Job]:
    """The jobs of submit.slurm.sweep; job: that of the configuration alone. UserError: an element is faulty, or two share a place."""
    elements = [
        build_job(
            load_config(path, [*overrides, *words, *_own_places(job, path, [*overrides, *words], words, index)]), local_paths=True
        )
        for index, words in enumerate(job.submit.slurm.sweep)
    ]
    for key in _OWN:
        times = Counter(place for element in elements if (place := element.paths[key]) is not None)
        if twice := sorted(place for place, count in times.items() if count > 1):
            raise UserError(f"submit.slurm.sweep: two elements have {key}={twice[0]}; leave it out or make them differ")
    return elements


def overrides_of(job: Job, element: Job, words: Sequence[str]) -> list[str]:
    """What the script puts behind the command for an element: its overrides, and its paths as they are on the cluster."""
    given = {_key(word) for word in words}
    changed = [key for key, place in element.paths.items() if key in given or place != job.paths[key]]
    # The run directory goes last, where a reader of the script looks for it.
    keys = sorted(changed, key=lambda key: key == "train.run_dir")
    return [*(word for word in words if _key(word) not in changed), *(override(key, element.paths[key]) for key in keys)]


def _own_places(job: Job, path: Path, overrides: Sequence[str], words: Sequence[str], index: int) -> Iterator[str]:
    given = {_key(word) for word in words}
    for key in given:
        if key.split(".")[0] == "submit":
            raise UserError(f"submit.slurm.sweep: {key} is one for all elements of an array job; set it outside the sweep")
    if "train.run_dir" not in given:
        yield f"train.run_dir={job.run_dir}-{index}"
    if "checkpoint.remote" not in given and (remote := load_config(path, overrides).checkpoint.remote) is not None:
        yield f"checkpoint.remote={_numbered(remote, index)}"


def _numbered(place: str, index: int) -> str:
    """A folder or URI beside `place`; in a bucket where that is one."""
    place, mark, options = place.partition("?") if "://" in place else (place, "", "")
    place = place.rstrip("/")
    whole_bucket = "://" in place and "/" not in place.partition("://")[2]
    return f"{place}{'/' if whole_bucket else '-'}{index}{mark}{options}"


def _key(word: str) -> str:
    return word.partition("=")[0]
