"""A scan of the package: what must outlive a power cut goes through storage/files.py, which syncs before and after each rename.

tests/distributed/test_power_cut.py holds that what goes through it is on the disk, for every writer.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# file: its calls, and why a power cut may undo them.
ALLOWED = {
    "rec_dist/storage/files.py": ["rename", "replace", "rename", "fsync"],  # put_in_place and sync themselves
    "rec_dist/checkpoint/state_files.py": ["fsync"],  # each rank syncs its own files, maybe on another node than the rename
    "rec_dist/checkpoint/manager.py": ["rename"],  # sets a damaged checkpoint aside; the next attempt would find it again
    "rec_dist/checkpoint/remote_files.py": ["move"],  # into the file system of the target, before put_in_place
    "rec_dist/storage/location.py": ["move"],  # of HDFS, which has its own promises
    "rec_dist/runtime/run_directory.py": ["replace"],  # progress.json: where the run stands now
    "rec_dist/runtime/heartbeat.py": ["replace", "replace", "replace"],  # signs of life of processes that a power cut ends
    "rec_dist/data/prepare/blockwise/scratch.py": ["replace"],  # work in progress, which a cut discards
}
_NAMES = {"rename", "renames", "replace", "move", "fsync", "fdatasync", "link_to", "symlink_to"}


def calls_in(text: str) -> Iterator[str]:
    """The names of calls that rename or sync files; text.replace(old, new) has two arguments."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in _NAMES:
            if node.func.attr == "replace" and len(node.args) != 1 and ast.unparse(node.func.value) != "os":
                continue
            yield node.func.attr


def test_files_are_renamed_and_synced_in_one_place() -> None:
    found = {
        str(path.relative_to(ROOT)): sorted(names)
        for path in (ROOT / "rec_dist").rglob("*.py")
        if (names := list(calls_in(path.read_text(encoding="utf-8"))))
    }
    assert found == {name: sorted(names) for name, names in ALLOWED.items()}


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("partial.rename(final)", ["rename"]),
        ("temporary.replace(path)", ["replace"]),
        ("os.replace(a, b)", ["replace"]),
        ("shutil.move(a, b)", ["move"]),
        ("os.fsync(handle)", ["fsync"]),
        ("text.replace('a', 'b')", []),
        ("put_in_place(a, b)", []),
    ],
)
def test_the_scan_finds(line: str, found: list[str]) -> None:
    assert list(calls_in(line)) == found
