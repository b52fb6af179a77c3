"""Names of files and classes, which may hold anything, for people to read. Standard library only."""

from __future__ import annotations

import re
import unicodedata


# Join letters and emoji; the other characters of their category hide, or turn the direction of what follows.
_JOINERS = "\u200c\u200d"


def printable(text: str, longest: int | None = None) -> str:
    """A name on one line that every file, terminal and font takes.

    Bytes that are no UTF-8 in file names, control characters and marks that turn the direction of writing become
    escapes such as `\\xe9` and `\\n`.

    Args:
        longest: characters at most; what is longer ends in an ellipsis.
    """
    text = "".join(map(_escaped, text))
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def _escaped(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cs":
        return undecodable_escaped(char)
    if category in ("Cc", "Zl", "Zp") or (category == "Cf" and char not in _JOINERS):
        return char.encode("unicode_escape").decode()
    return char


def undecodable_escaped(text: str) -> str:
    """Text in which what stands for undecodable bytes is written out, so that it can be encoded."""
    text = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()
