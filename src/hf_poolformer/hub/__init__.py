"""Publishing: model cards, uploads and checkpoint conversion."""
