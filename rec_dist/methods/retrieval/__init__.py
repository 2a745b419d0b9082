"""Retrieval: a language model encodes the history, and items are vectors that it is compared with."""
