"""Annotated shapes, and settings to train on them."""

from shapes import make_settings, shapes  # noqa: F401
