"""A configuration as text: YAML and command-line words that mean exactly the values that they were made from.

Two readers stand in the way. OmegaConf resolves ${...} wherever it is not escaped, and takes 1e3 for a number, which PyYAML
writes without quotes.
"""

import math
import re
from typing import Any

from pydantic import BaseModel
from yaml import SafeDumper, dump

_LIKE_A_NUMBER = re.compile(
    r"[-+.]?[0-9][0-9_.eE:+-]*|0[xXbBoO][0-9a-fA-F_]*"
)  # wider than a number: quotes too many are harmless
_PLAIN_WORD = re.compile(r"[A-Za-z0-9_./][A-Za-z0-9_./@%+=-]*|[a-z0-9]+://[A-Za-z0-9_./@%+=&?:-]+")
_LINE_BREAK = re.compile("[\r\x85\u2028\u2029]")  # YAML reads each of them as a line feed, unless it is quoted and escaped
_OTHER_WORDS = {"null", "true", "false", "yes", "no", "on", "off", "y", "n", ".inf", ".nan", ".", "="}  # to YAML


def to_yaml(config: BaseModel, *, exclude_unset: bool = False) -> str:
    """The resolved configuration as YAML that load_config and load_saved read back, whatever text is in it.

    exclude_unset: without the keys that nobody has set.
    """
    return dumped(escaped(config.model_dump(mode="json", exclude_unset=exclude_unset)))


def dumped(value: dict[str, Any]) -> str:
    """Values that are escaped already as YAML."""
    return str(dump(value, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=math.inf))


def to_word(text: str) -> str:
    """Text as the value of an override, section.key=VALUE: as it is if that means the text itself, else quoted and escaped."""
    if _PLAIN_WORD.fullmatch(text) and not _LIKE_A_NUMBER.fullmatch(text) and text.lower() not in _OTHER_WORDS:
        return text
    quoted = dump(escaped(text), Dumper=SafeDumper, default_style='"', allow_unicode=True, width=math.inf)
    return str(quoted).removesuffix("\n")


def escaped(value: Any) -> Any:
    """Resolved values such that text with ${...} in it, such as an instruction, is not resolved a second time."""
    if isinstance(value, dict):
        return {key: escaped(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [escaped(entry) for entry in value]
    return re.sub(r"(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def unescaped(value: Any) -> Any:
    """The inverse of escaped(). A ${ that is not escaped stays as it is."""
    if isinstance(value, dict):
        return {key: unescaped(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [unescaped(entry) for entry in value]
    return re.sub(r"(\\+)\$\{", _half, value) if isinstance(value, str) else value


def _half(found: re.Match[str]) -> str:
    """2 n + 1 backslashes before ${ stand for n. An even number escapes backslashes and not the ${."""
    return "\\" * (len(found[1]) // 2) + "${"


class _Dumper(SafeDumper):  # type: ignore[misc]  # PyYAML has no types here
    """Writes text of several lines in block style, and in quotes what would be read as a number or with other line breaks."""


def _text(dumper: Any, text: str) -> Any:
    quoted = _LIKE_A_NUMBER.fullmatch(text) or _LINE_BREAK.search(text)
    style = '"' if quoted else "|" if text.endswith("\n") else None
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_Dumper.add_representer(str, _text)
