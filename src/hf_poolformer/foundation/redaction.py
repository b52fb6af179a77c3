"""What must not stand in messages and logs: tokens, passwords, signatures. Standard library only."""

from __future__ import annotations

import re
from collections.abc import Iterable


HUB_TOKEN = r"\bhf_[A-Za-z0-9]{30,}"


def redact(text: str, secrets: Iterable[str | None] = ()) -> str:
    """`text` without `secrets` and other tokens of the Hub, and without signatures and passwords in addresses."""
    for secret in filter(None, secrets):
        text = text.replace(secret, "<token>")
    text = re.sub(HUB_TOKEN, "<token>", text)
    text = re.sub(r"(https?://[^\s?'\"]+)\?[^\s'\"]+", r"\1", text)
    return re.sub(r"(https?://)[^/@\s]+@", r"\1", text)
