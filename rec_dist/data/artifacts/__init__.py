"""Arrow files that a model writes and a later step reads: a teacher's lists, embeddings, predictions, reference log-probs.

Imports dataset (to read Arrow files).
"""
