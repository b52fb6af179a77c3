"""Digits, and settings to train on them: what data means shows in what is learnt of it."""

from digits import digits, make_settings, one_thread  # noqa: F401
