"""Annotated shapes, and settings to train on them."""

from shapes import late_damage, make_settings, shapes  # noqa: F401
