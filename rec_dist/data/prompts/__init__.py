"""Prompts as tokens: titles, the prompt builder, and prompts for interactions or preference rows.

Imports sampling and dataset.
"""
