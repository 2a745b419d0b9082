"""`rec-dist prepare`: raw rows -> a prepared data set, in memory or block by block, with the same bytes.

Imports readers and prepared.
"""
