"""Publishing: model cards, uploads and checkpoint conversion."""

from .publishing import Publication, PublishError, publish


__all__ = ["Publication", "PublishError", "publish"]
