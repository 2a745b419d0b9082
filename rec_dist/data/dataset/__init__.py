"""A prepared data set: the format of its folder or URI, how it is opened through the node's cache, and what is wrong with one.

Imports no other room of rec_dist.data.
"""
