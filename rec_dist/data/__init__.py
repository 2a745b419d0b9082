"""Data on its way from raw files to what a model trains on, and what models leave for later steps. Rooms, lower ones first:

prepared    the format of a prepared data set, and how one is opened
readers     raw files -> rows
preparing   rows -> a prepared data set
sampling    what is trained on and in which order, and the items drawn against it
prompts     items, titles and texts -> prompts of tokens
artifacts   Arrow files that a model leaves and a later step reads

Each room's docstring names the others it imports; tests/test_architecture.py holds it to that.
"""
