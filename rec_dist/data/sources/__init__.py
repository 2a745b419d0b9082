"""Raw files of several formats into one in-memory table of interactions, or block by block. Imports prepared (a preference row)."""

from rec_dist.data.sources.formats import FileSet, find_files, open_source, read_interactions
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.tables import write_tables

__all__ = ["FileSet", "Source", "find_files", "open_source", "read_interactions", "write_tables"]
