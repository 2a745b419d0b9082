"""Rewrites titles as an English reader expects them, and extracts the year in them."""

import re

_ARTICLES = "The|A|An|La|Le|Les|L'|Il|El|Los|Las|Der|Die|Das|Det|Den"
_TRAILING_ARTICLE = re.compile(rf"([^()]+), ({_ARTICLES})(?=\s*(?:$|\(|\)))")
_TRAILING_YEAR = re.compile(r"\s*\((\d{4})\)\s*$")
_YEAR = re.compile(r"(\d{4})(?:\.0*)?")


def restore_article(title: str) -> str:
    """Moves the trailing article of a library catalogue to the front, also in parentheses.

    >>> restore_article("Big Blue, The (Grand bleu, Le)")
    'The Big Blue (Le Grand bleu)'
    """

    def swapped(match: re.Match[str]) -> str:
        name, article = match.group(1), match.group(2)
        return article + name if article.endswith("'") else f"{article} {name}"

    return _TRAILING_ARTICLE.sub(swapped, title)


def split_year(title: str) -> tuple[str, int | None]:
    """Cuts a trailing year off a title: "Heat (1995)" -> ("Heat", 1995). Returns (title, None) if there is none."""
    match = _TRAILING_YEAR.search(title)
    if match is None or match.start() == 0:
        return title, None
    return title[: match.start()], int(match.group(1))


def parse_year(text: str) -> int | None:
    """Reads a year written as 1995 or 1995.0. Returns None for anything else."""
    match = _YEAR.fullmatch(text.strip())
    return int(match.group(1)) if match else None
