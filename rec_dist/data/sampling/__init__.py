"""Training examples, their order and their assignment to ranks, and the negatives drawn for them.

Imports dataset.
"""
