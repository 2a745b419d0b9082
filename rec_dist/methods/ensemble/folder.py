"""The model folder of an ensemble: ensemble.json, which names its members, and a copy of each. Imports no torch."""

from pathlib import Path

from rec_dist.methods.catalogue_file import CatalogueFile
from rec_dist.storage.checksums import CHECKSUMS_NAME

DESCRIPTION, MEMBERS_NAME = CatalogueFile("ensemble.json"), "members"


def lost_files(folder: Path) -> list[str]:
    """A phrase for each file that is gone without which a member cannot be checked; none if `folder` is no ensemble's."""
    if not (folder / DESCRIPTION.name).is_file():
        return []
    members = [Path(MEMBERS_NAME, str(name)) for name in DESCRIPTION.read(folder).get("members", [])]
    files = [member / name for member in members for name in ("config.yaml", f"model/{CHECKSUMS_NAME}")]
    return [f"{file} is missing" for file in files if not (folder / file).is_file()]
