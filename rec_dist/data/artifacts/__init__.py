"""Arrow files that a model leaves and a later step reads: a teacher's lists, embeddings, predictions, reference log-probs.

Imports prepared (the entry of a file, with its hash).
"""
