"""A prepared data set: the format of its files, how it is opened through the node's cache, and how it is verified.

Imports no other sub-package of rec_dist.data.
"""
