"""Reads raw files of several formats into one table of interactions in memory, or block by block.

Imports dataset (for a preference row).
"""

from rec_dist.data.sources.formats import FileSet, SourceStore, find_files, open_source, read_interactions
from rec_dist.data.sources.source import Source
from rec_dist.data.sources.tables import write_tables

__all__ = ["FileSet", "Source", "SourceStore", "find_files", "open_source", "read_interactions", "write_tables"]
