"""Faults of storage and network: which of them pass by themselves, and how long to wait for that.

Needs nothing beyond the standard library: errors of HTTP clients are told by where their classes come from.
"""

from __future__ import annotations

import errno
import http.client
import logging
import time
from collections.abc import Sequence


logger = logging.getLogger(__name__)

# Seconds before each new attempt. The clients below (huggingface_hub, datasets) have tried several times by then.
DELAYS: Sequence[float] = (1, 2, 4, 8, 16, 32)

_CLIENTS = frozenset(["httpx", "httpx2", "httpcore", "httpcore2", "aiohttp", "requests", "urllib3", "huggingface_hub"])
_STATUSES = frozenset([408, 425, 429, 500, 502, 503, 504])
_ERRNOS = frozenset(
    [
        errno.ECONNRESET,
        errno.ECONNABORTED,
        errno.ECONNREFUSED,
        errno.EPIPE,
        errno.ETIMEDOUT,
        errno.ENETDOWN,
        errno.ENETUNREACH,
        errno.EHOSTUNREACH,
    ]
)


def is_transient(error: BaseException) -> bool:
    """Whether the same request may succeed a little later: network trouble and busy servers, not damaged files."""
    seen = set()
    current: BaseException | None = error
    while current is not None and id(current) not in seen:
        seen.add(id(current))
        verdict = _verdict(current)
        if verdict is not None:
            return verdict
        current = current.__cause__ or current.__context__
    return False


class Patience:
    """Waits longer and longer between attempts, until it has run out; progress renews it."""

    def __init__(self, delays: Sequence[float] | None = None):
        self._delays = DELAYS if delays is None else delays
        self._failures = 0

    def renew(self) -> None:
        """To be called when something was read."""
        self._failures = 0

    def wait(self, what: str) -> bool:
        """Sleeps before the next attempt at `what`; False, at once, if there should be none."""
        if self._failures >= len(self._delays):
            return False
        delay = self._delays[self._failures]
        self._failures += 1
        logger.warning("%s; trying again in %g s (%d of %d)", what, delay, self._failures, len(self._delays))
        time.sleep(delay)
        return True


def _verdict(error: BaseException) -> bool | None:
    """True or False where this exception alone tells, None where its cause must be asked."""
    status = getattr(getattr(error, "response", None), "status_code", None) or getattr(error, "status", None)
    from_client = (type(error).__module__ or "").partition(".")[0] in _CLIENTS
    if from_client and isinstance(status, int):
        return status in _STATUSES
    if isinstance(error, (ConnectionError, TimeoutError, http.client.HTTPException)):
        return True
    if isinstance(error, (FileNotFoundError, PermissionError)):
        return False
    if isinstance(error, OSError) and error.errno in _ERRNOS:
        return True
    return True if from_client and not isinstance(error, ValueError) else None
