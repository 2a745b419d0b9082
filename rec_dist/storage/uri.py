"""Paths and URIs as text: which is which, how messages show them, and what may stand in them: no credentials, no way out.

A URI with credentials is rejected, since config.yaml and its copies would hold them. The code takes URIs apart by hand, because
an access key that is pasted unquoted (with a `/`, `#`, `?` or a space in it) does not make a URI that a parser accepts.
"""

import re
from pathlib import Path

from rec_dist.errors import UserError

_LOCAL = "file://"
_NO_SECRET = {"gs": "anonymous", "hdfs": r"[\w.-]+"}  # pyarrow accepts these before the `@`: a public bucket, a Hadoop user
_PORT = re.compile(r"[^:]*:\d*|\[.*\](:\d*)?")
_NAME_BYTES = 255  # the longest file name on a file system


def is_remote(path: str | Path) -> bool:
    """Whether a path names a file system by its scheme. A file:// path is on this machine."""
    return "://" in str(path) and not str(path).startswith(_LOCAL)


def is_below(name: str) -> bool:
    """Whether a file system can hold `name` below a folder, and nowhere else.

    Names come from keys of object stores and from files of others: they may have `..`, empty parts, NUL, 1,024 bytes or half
    characters.
    """
    try:
        return "\0" not in name and all(
            part not in ("", ".", "..") and len(part.encode()) <= _NAME_BYTES for part in name.split("/")
        )
    except UnicodeEncodeError:
        return False


def local_path(path: str | Path) -> Path:
    """The absolute path of a file or folder on this machine. Raises UserError for ~user if there is no such user."""
    return expanded(str(path).removeprefix(_LOCAL)).absolute()


def expanded(path: str | Path) -> Path:
    """The path with ~ replaced by a home folder. Raises UserError for ~user if there is no such user."""
    try:
        return Path(path).expanduser()
    except RuntimeError as fault:
        raise UserError(f"{path} names the home of a user who is not known here; give the path itself") from fault


def shown(path: str) -> str:
    """The path as messages show it: a URI without its options and user info, any other path unchanged."""
    scheme, mark, rest = path.partition("://")
    if not mark:
        return path
    if _user_info(path) is not None:
        before, _, after = rest.partition("?")
        rest = (before if "@" in before else after).rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0].rstrip('/')}"


def refuse_credentials(path: str, key: str) -> None:
    """Raises UserError if `path`, the value of `key`, is a URI that holds credentials."""
    scheme, _, rest = path.partition("://")
    user = _user_info(path) or ""
    harmless = re.fullmatch(_NO_SECRET.get(scheme, ""), user, re.ASCII)
    if (user and not harmless) or "@" in rest.partition("?")[2]:
        raise UserError(
            f"{key} ({shown(path)}) has credentials in it, and the configuration is written to disk; take them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of the store's own tools, on every machine"
        )


def _user_info(uri: str) -> str | None:
    """The part before the bucket or host. A `:` there that no port follows begins a key that holds a `/`, `#` or `?`."""
    scheme, _, rest = uri.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_port = _PORT.fullmatch(authority) and (scheme == "hdfs" or "@" not in rest)
    if "@" not in authority and (":" not in authority or is_port):
        return None
    before, _, after = rest.partition("?")
    if "@" in before:
        return before.rpartition("@")[0]
    return f"{before}?{after.rpartition('@')[0]}" if "@" in after else before
