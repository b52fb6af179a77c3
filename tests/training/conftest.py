"""Digits, settings to train on them, and small classifiers."""

from digits import (  # noqa: F401
    all_digits,
    digits,
    digits_of_kinds,
    make_checkpoint,
    make_settings,
    make_settings_from,
    make_settings_of,
    one_thread,
    own_precision,
)
