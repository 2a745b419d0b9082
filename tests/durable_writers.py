"""A program whose system calls test_power_cut.py records: every writer writes below one folder, and what may be replaced is.

python durable_writers.py ROOT CONFIG.yaml, where CONFIG.yaml keeps its data in ROOT/data and a copy of the run in ROOT/copy.
"""

import os
import sys
from pathlib import Path

from s3_server import CREDENTIALS, running

from rec_dist.cli import main
from rec_dist.data.dataset.manifest import Manifest
from rec_dist.data.dataset.node_cache import NodeCache
from rec_dist.storage.files import put_in_place, write_json
from rec_dist.storage.location import Location


def command(*words: object) -> None:
    code = main([str(word) for word in words])
    assert code == 0, (words, code)


def fill_cache(root: Path) -> None:
    """Fetches a file of the data set from an object store into the node's cache, as readers do."""
    with running() as server:
        location = Location(server.put(root / "data", "data"))
        for entry in Manifest.load(location).files[:2]:
            with NodeCache(root / "cache", 1 << 30).opened(location, entry):
                pass


def replace_folder(root: Path) -> None:
    """A folder of two levels takes the place of an older one."""
    for number in (1, 2):
        made = root / ".made"
        (made / "below").mkdir(parents=True)
        (made / "below" / "file").write_text(str(number))
        (made / "large").write_bytes(bytes(number << 16))
        put_in_place(made, root / "replaced")
        write_json(root / "number.json", {"number": number})


def write_all(root: Path, config: Path) -> None:
    command("prepare", config)
    command("prepare", config, "data.prepare_on=disk", f"data.path={root / 'on_disk'}")
    command("train", config, f"train.run_dir={root / 'run'}")
    command("train", config, f"train.run_dir={root / 'fetched'}")
    for users in (5, 6):
        command("evaluate", root / "run", f"evaluate.max_users={users}")
    command("export", root / "run", "--out", root / "merged", "--format", "merged")
    command("embed", root / "run", root / "embeddings")
    fill_cache(root)
    replace_folder(root)


if __name__ == "__main__":
    os.environ.update(CREDENTIALS)
    write_all(Path(sys.argv[1]), Path(sys.argv[2]))
