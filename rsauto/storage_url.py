"""A storage URL as it may be told: its passwords are for the database alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from urllib.parse import unquote, unquote_plus

_USER = re.compile(r"(?P<before>//[^:/?#@]*):(?P<secret>[^?#]*)@")
"""Up to the last @: a password may hold one, although it should be written %40."""

_QUERY = re.compile(
    r"(?P<before>[?&;][^=&;]*(?:pass|pwd|secret|token|key)[^=&;]*=)(?P<secret>[^&;#]*)", re.I
)


def shown(url: str) -> str:
    """The URL without its passwords, also one that is not written as it should be."""
    without = _USER.sub(r"\g<before>:***@", url)
    if "://" not in url:  # it is no URL, and no less a password
        without = re.sub(r"(^|[:/])([^:/@]*):[^?#]*@", r"\1\2:***@", url, count=1)
    return _QUERY.sub(r"\g<before>***", without)


def without_secrets(text: str, url: str) -> str:
    """What a library said of the URL, with *** in place of the passwords, however it wrote them."""
    for secret in sorted(_secrets(url), key=len, reverse=True):
        whole = re.escape(secret) if len(secret) > 3 else rf"(?<!\w){re.escape(secret)}(?!\w)"
        text = re.sub(whole, "***", text)
    return text


def _secrets(url: str) -> Iterator[str]:
    for pattern in (_USER, _QUERY):
        for match in pattern.finditer(url):
            written = match["secret"]
            # A library may have cut it at a letter that should have been written as %40.
            parts = {part for part in re.split("[@:/]", written) if len(part) > 3}
            yield from filter(None, {written, unquote(written), unquote_plus(written), *parts})
