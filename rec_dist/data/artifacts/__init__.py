"""Arrow files that a model leaves and a later step reads: a teacher's lists, embeddings, predictions, reference log-probs.

May import prepared (the entry of a file, with its hash).
"""
