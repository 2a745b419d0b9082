"""The templates in launchers/, one a scheduler. `rec-dist submit` renders them, or the edited copy named by submit.*.template."""

import json
import re
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jinja2

from rec_dist.errors import UserError
from rec_dist.storage.uri import expanded

_PACKAGE = Path(__file__).resolve().parents[1]
_LINE_BREAK = re.compile("[\n\x85\u2028\u2029]")  # of YAML; jinja2's own filter `indent` knows more, and replaces them
# Letters of JSON that would end a line of YAML, or that it rejects.
_ESCAPED = re.compile("[\x7f-\x9f\u2028\u2029\ufeff\ufffe\uffff]")


def launchers() -> Path:
    """The folder launchers/: in an installed package inside it, in a checkout beside it."""
    installed = _PACKAGE / "launchers"
    return installed if installed.is_dir() else _PACKAGE.parent / "launchers"


def render(name: str, own: str | None, key: str, values: Mapping[str, Any]) -> str:
    """The text of launchers/`name`, or of the template `own` that the user gave as `key`.

    Raises UserError if the user's template cannot be read or rendered.
    """
    path = launchers() / name if own is None else expanded(own)
    environment = jinja2.Environment(
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        comment_start_string="<#",  # jinja2's own, {#, is what bash writes for a length: ${#words}
        comment_end_string="#>",
    )
    environment.filters["sh"] = _quoted
    environment.filters["json"] = _json
    environment.filters["indented"] = lambda text, width: _LINE_BREAK.sub(rf"\g<0>{' ' * width}", text)
    try:
        return environment.from_string(path.read_text(encoding="utf-8")).render(values)
    except (OSError, UnicodeDecodeError) as fault:
        raise UserError(f"{key} ({path}) cannot be read: {fault}; give an edited copy of {launchers() / name}") from fault
    except (jinja2.TemplateError, TypeError, ValueError) as fault:
        if own is None:
            raise
        line = f", line {fault.lineno}" if isinstance(fault, jinja2.TemplateSyntaxError) else ""
        raise UserError(f"{key} ({path}{line}): {fault}; compare it with {launchers() / name}") from fault


def _json(value: Any) -> str:
    """JSON on one line of YAML."""
    return _ESCAPED.sub(lambda found: f"\\u{ord(found[0]):04x}", json.dumps(value, ensure_ascii=False))


def _quoted(value: Any) -> str:
    """A word for the shell; with commas always in quotes, because shellcheck takes bare ones in arrays for a mistake."""
    text = str(value)
    quoted = shlex.quote(text)
    return f"'{text}'" if quoted == text and "," in text else quoted
