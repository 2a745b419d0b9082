"""Tokens: titles, the prompt builder, and trunks of interactions or of preference rows. May import sampling and prepared."""
