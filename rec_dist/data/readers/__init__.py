"""Raw files of several formats into one in-memory table of interactions."""

from rec_dist.data.readers.formats import FileSet, find_files, read_interactions

__all__ = ["FileSet", "find_files", "read_interactions"]
