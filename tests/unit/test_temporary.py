"""Temporary folders in a cache: what a killed process left goes, what is in use or young stays."""

import os
import time
from pathlib import Path

from rec_dist.storage.files import lock
from rec_dist.storage.temporary import temporary_folder


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    two_days_ago = time.time() - 2 * 86400
    for name in ("source-killed", "source-young", "source-used", "prepare-killed"):
        (tmp_path / name / "files").mkdir(parents=True)
        (tmp_path / name / "files" / "log.csv").write_text("as large as the data")
    used = lock(tmp_path / "source-used" / ".lock")
    for name in ("source-killed", "source-used", "prepare-killed"):
        os.utime(tmp_path / name, (two_days_ago, two_days_ago))
    with temporary_folder(tmp_path, "source-") as folder:
        assert list(folder.iterdir()) == []
        (folder / "log.csv").touch()
        own = folder.parent
        os.utime(own, (two_days_ago, two_days_ago))
        with temporary_folder(tmp_path, "source-"):
            assert (folder / "log.csv").exists(), "it is in use, however old"
        assert {path.name for path in tmp_path.iterdir()} == {"source-young", "source-used", "prepare-killed", own.name}
    assert not own.exists()
    os.close(used)
    with temporary_folder(tmp_path, "source-"):
        assert not (tmp_path / "source-used").exists()
