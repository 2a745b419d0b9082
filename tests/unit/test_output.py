"""Which places may be written, checked before anything is computed, by `check_output` alone and by the commands that call it."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from rec_dist.errors import UserError
from rec_dist.storage.outputs import check_output


@pytest.fixture
def place(tmp_path: Path) -> Path:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").write_text("years of work")
    (tmp_path / "nothing").symlink_to("nowhere")
    (tmp_path / "loop").symlink_to("loop")
    return tmp_path


@pytest.mark.parametrize(
    ("name", "folder", "may_exist", "says"),
    [
        ("file", False, False, "exists; choose a file that does not"),
        ("folder", True, False, "exists; choose a folder that does not"),
        ("folder", False, False, "is a folder; choose another file"),
        ("file", True, False, "is no folder; choose another folder"),
        ("file", True, True, "is no folder; choose another folder"),
        ("file/x", False, False, "lies below {place}/file, which is no folder"),
        ("file/deep/x", True, True, "lies below {place}/file, which is no folder"),
        ("nothing", False, False, "is a link to nothing; remove it"),
        ("nothing/x", False, False, "lies below {place}/nothing, which is no folder"),
        ("loop", True, True, "is a link to nothing"),
        ("x" * 300, False, False, "cannot be written: File name too long; choose another file"),
        ("x" * 250, False, False, "cannot be written: File name too long; choose another file"),
        ("x" * 256, True, True, "cannot be written: File name too long; choose another folder"),
        ("nul\0", True, False, "nul\\0) is not a usable path"),
        ("/proc/x", False, False, "cannot be written"),
    ],
)
def test_what_cannot_be_written_is_reported(place: Path, name: str, folder: bool, may_exist: bool, says: str) -> None:
    before = sorted(entry.name for entry in place.rglob("*"))
    with pytest.raises(UserError) as refusal:
        check_output(place / name, "--out", folder=folder, may_exist=may_exist)
    said = str(refusal.value)
    assert said.startswith("--out (") and says.format(place=place) in said and "choose" in said and "\0" not in said
    assert sorted(entry.name for entry in place.rglob("*")) == before


@pytest.mark.parametrize(("name", "folder"), [("new", False), ("new/deep/x", False), ("new/deep", True), ("folder", True)])
def test_what_can_be_written_is_left_as_it_was(place: Path, name: str, folder: bool) -> None:
    before = sorted(entry.name for entry in place.rglob("*"))
    check_output(place / name, "--out", folder=folder, may_exist=True)
    assert sorted(entry.name for entry in place.rglob("*")) == before


@pytest.mark.skipif(shutil.which("setpriv") is None, reason="needs setpriv")
@pytest.mark.skipif(os.getuid() != 0, reason="gives up the rights of root in a process of its own")
@pytest.mark.parametrize(("name", "folder"), [("x.json", False), ("new/x.json", False), ("", True)])
def test_a_folder_that_is_closed_to_this_user(tmp_path: Path, name: str, folder: bool) -> None:
    """Checks the mode as a user other than root, since no mode keeps root out."""
    tmp_path.chmod(0o555)
    code = (
        "import sys; from pathlib import Path; from rec_dist.storage.outputs import check_output\n"
        "try: check_output(Path(sys.argv[1]), '--out', folder=sys.argv[2] == 'True', may_exist=True)\n"
        "except ValueError as fault: print(fault)"
    )
    without_rights = ("setpriv", "--bounding-set", "-all", "--inh-caps", "-all")
    words = [*without_rights, sys.executable, "-c", code, str(tmp_path / name), str(folder)]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert "cannot be written: Permission denied; choose another" in done.stdout, done.stderr
    assert "or make that place writable" in done.stdout
