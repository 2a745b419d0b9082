"""Tokens: titles, the prompt builder, and prompts of interactions or of preference rows. Imports sampling and prepared."""
