"""Tokens: titles, the prompt builder, and trunks of interactions or of preference rows. Imports sampling and prepared."""
