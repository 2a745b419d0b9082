"""`rec-dist init`: writes a shipped recipe, with its comments, to a file of your own."""

import re
import shlex
from pathlib import Path

from rec_dist.config.shipped import is_name, shipped_file, suggestion
from rec_dist.errors import UserError
from rec_dist.storage.files import write_text
from rec_dist.storage.outputs import check_output


def init(name: str, output: Path | None = None) -> Path:
    """Writes the recipe `name` (or a group such as method/sdpo) to `output`, by default NAME.yaml here. Returns that path.

    What the recipe extends stays shipped: its names still resolve. Commands in its comments name the new file.
    Raises UserError if there is no such recipe, or if the file exists already.
    """
    source = shipped_file(name)
    if not is_name(name) or not source.is_file():
        raise UserError(f"{name} is no recipe; {suggestion(name)}")
    path = output or Path(source.name)
    if path.exists() or path.is_symlink():
        raise UserError(f"{path} exists already; give another FILE, such as `rec-dist init {name} my-{source.name}`")
    if not path.parent.is_dir():
        raise UserError(f"{path.parent} is no folder; create it, or give another FILE")
    check_output(path, "FILE")
    text = source.read_text(encoding="utf-8")
    shown = shlex.quote(str(path))
    write_text(path, re.sub(rf"(rec-dist \w+ ){re.escape(source.stem)}(?![\w-])", lambda found: f"{found[1]}{shown}", text))
    return path
