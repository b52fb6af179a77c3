"""Which model of the Hub is meant, beside its name. Standard library only."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any


@dataclass(frozen=True)
class Origin:
    """Beside its name, what decides which model of the Hub is meant and who may load it.

    Attributes:
        revision: branch, tag or commit.
        token: Hub token; not shown.
        cache_dir: where downloads are kept; None: the Hub's usual cache.
        trust_remote_code: run code that comes with the model.
    """

    revision: str = "main"
    token: str | None = field(default=None, repr=False)
    cache_dir: str | None = None
    trust_remote_code: bool = False

    def arguments(self) -> dict[str, Any]:
        """As `from_pretrained` takes it."""
        return {item.name: getattr(self, item.name) for item in fields(self)}
