"""An extension of griffe (mkdocs.yml): doctests in docstrings become blocks of code, which Markdown would take for quotations."""

import re
from textwrap import dedent
from typing import Any

from griffe import Extension, Object

_DOCTEST = re.compile(r"^[ ]*>>> .*(?:\n(?!\s*$).*)*", re.MULTILINE)  # up to a blank line


def fenced(text: str) -> str:
    """A docstring with its doctests as blocks of code, without their directives."""
    return _DOCTEST.sub(lambda block: f"```pycon\n{dedent(re.sub(r'  # doctest: .*', '', block[0]))}\n```", text)


class FencedDoctests(Extension):
    """Rewrites every docstring once it is read."""

    def on_object(self, *, obj: Object, **_: Any) -> None:
        if obj.docstring:
            obj.docstring.value = fenced(obj.docstring.value)
