"""Before the first step: packed files are unpacked, so that any job can read a block from the middle of one."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from rec_dist.data.prepare.blockwise.scratch import Work, whole_or_absent
from rec_dist.data.sources.blocks import Block
from rec_dist.data.sources.packed import packing, unpack


def plain_files(
    files: list[Block], folder: Path, work: Work, each: Callable[[str, Callable[[Any], Any], Sequence[Any]], Iterable[Any]]
) -> list[Block]:
    """The same files, and plain copies of the packed ones in `folder`. each: runs a step.

    If the machines have no folder in common, this process unpacks, and puts a second copy into the work.
    """
    packed = {file.data: folder / f"unpacked-{file.file}" for file in files if packing(file.data) is not None}
    if packed and not work.is_remote:
        list(each("unpack", _unpack, list(packed.items())))
    stored = {}
    for source, plain in packed.items() if work.is_remote else ():
        unpack(source, plain)
        file = work / plain.name
        file.location.write(plain, file.below)
        stored[plain] = (work.place, file.below)
    data = [packed.get(file.data, file.data) for file in files]
    return [replace(file, data=path, stored=stored.get(path, file.stored)) for file, path in zip(files, data, strict=True)]


def _unpack(job: tuple[Path, Path]) -> None:
    source, plain = job
    with whole_or_absent(plain) as temporary:
        unpack(source, temporary)
