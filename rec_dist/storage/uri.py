"""What messages show of a URI, and credentials in it, which are refused: they would stand in config.yaml and its copies.

By hand, since a key that was pasted unquoted (`/`, `#`, `?` or a space in it) makes no URI that a parser takes.
"""

import re

from rec_dist.errors import UserError

_NO_SECRET = {"gs": "anonymous", "hdfs": r"[\w.-]+"}  # what pyarrow takes before the `@`: a public bucket, a Hadoop user
_PORT = re.compile(r"[^:]*:\d*|\[.*\](:\d*)?")


def shown(path: str) -> str:
    """A path as it is; a URI without options and user info."""
    scheme, mark, rest = path.partition("://")
    if not mark:
        return path
    if _user_info(path) is not None:
        before, _, after = rest.partition("?")
        rest = (before if "@" in before else after).rpartition("@")[2]
    return f"{scheme}://{rest.partition('?')[0].rstrip('/')}"


def refuse_credentials(path: str, key: str) -> None:
    """UserError: it is a URI with credentials in it. key: what the user set it with."""
    scheme, _, rest = path.partition("://")
    user = _user_info(path) or ""
    harmless = re.fullmatch(_NO_SECRET.get(scheme, ""), user, re.ASCII)
    if (user and not harmless) or "@" in rest.partition("?")[2]:
        raise UserError(
            f"{key} ({shown(path)}) has credentials in it, which would be written down with the configuration; take them out and set "
            "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or a profile of the store's own tools, on every machine"
        )


def _user_info(uri: str) -> str | None:
    """What stands before the bucket or host. A `:` there without a port behind it begins a key that holds a `/`, `#` or `?`."""
    scheme, _, rest = uri.partition("://")
    authority = re.split(r"[/?#]", rest, maxsplit=1)[0]
    is_port = _PORT.fullmatch(authority) and (scheme == "hdfs" or "@" not in rest)
    if "@" not in authority and (":" not in authority or is_port):
        return None
    before, _, after = rest.partition("?")
    if "@" in before:
        return before.rpartition("@")[0]
    return f"{before}?{after.rpartition('@')[0]}" if "@" in after else before
