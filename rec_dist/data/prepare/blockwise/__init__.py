"""Prepares a source of any size through files on disk, in jobs of bounded memory that any number of processes can run."""
