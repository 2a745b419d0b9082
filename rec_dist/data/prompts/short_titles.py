"""Cuts titles that take too many tokens: on a word where there is one, and so that no two titles become the same.

One title of 3,000 letters would make every prompt that holds it too long. Cost: about ten encodings of each title that is cut.
"""

import logging
from collections.abc import Callable, Sequence

from rec_dist.errors import UserError

logger = logging.getLogger(__name__)


def cut_titles(titles: Sequence[str], lengths: Sequence[int], most: int, length_of: Callable[[str], int]) -> list[str]:
    """The titles, those of more than `most` tokens cut. lengths: their tokens. length_of: the tokens of any title.

    A cut title that another item has already gets a number: "The Collected Works (2)". Equal titles stay equal. Raises UserError
    where `most` tokens hold not even one character and a number.
    """
    taken = {title for title, length in zip(titles, lengths, strict=True) if length <= most}
    cut: dict[str, str] = {}
    for title, length in zip(titles, lengths, strict=True):
        if length <= most or title in cut:
            continue
        number, short = 1, _cut(title, "", most, length_of)
        while short in taken:
            number += 1
            short = _cut(title, f" ({number})", most, length_of)
        taken.add(short)
        cut[title] = short
    first = next(iter(cut))
    logger.warning(
        f"{len(cut)} titles have more than {most} tokens (prompt.max_title_tokens) and are cut, the first to {cut[first]!r:.60}"
    )
    return [cut.get(title, title) for title in titles]


def _cut(title: str, end: str, most: int, length_of: Callable[[str], int]) -> str:
    """The longest beginning of whole words, or of characters if not even one word fits, with `end` behind it."""
    words = title.split()
    for parts, joint in ((words, " "), (list(title), "")):
        low, high = 0, len(parts)  # `low` parts fit
        while high - low > 1:
            middle = (low + high) // 2
            fits = length_of(joint.join(parts[:middle]) + end) <= most
            low, high = (middle, high) if fits else (low, middle)
        if low:
            return joint.join(parts[:low]).rstrip() + end
    raise UserError(f"prompt.max_title_tokens ({most}) holds not even one character of the title {title[:60]!r}; raise it")
