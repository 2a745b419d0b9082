"""Data from raw files to what a model trains on, and what models write for later steps. Sub-packages, lower layers first:

dataset     the format of a prepared data set, and how it is opened and verified
sources     raw files of several formats -> rows
sampling    training examples, their order, and negatives
artifacts   Arrow files that a model writes and a later step reads
prepare     rows -> a prepared data set
prompts     items, titles and texts -> prompts of tokens

The docstring of each sub-package names the others that it imports, and tests/test_architecture.py checks it.
"""
