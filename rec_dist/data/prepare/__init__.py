"""`rec-dist prepare`: turns raw rows into a prepared data set, in memory or block by block; both write the same bytes.

Imports sources and dataset.
"""
