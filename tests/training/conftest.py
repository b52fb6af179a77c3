"""Digits, settings to train on them, and small classifiers."""

from digits import (  # noqa: F401
    all_digits,
    digits,
    make_checkpoint,
    make_settings,
    make_settings_from,
    one_thread,
)
