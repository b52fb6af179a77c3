"""Digits, settings to train on them, and small classifiers."""

from importlib.util import find_spec
from pathlib import Path

import pytest
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


@pytest.fixture
def drawn():
    """For tests of pictures."""


@pytest.fixture(autouse=True)
def composed_only(request, monkeypatch):
    """Pictures that nobody looks at are composed, and not painted: that takes as long as ten steps of such models."""
    if "drawn" not in request.fixturenames and find_spec("matplotlib"):
        monkeypatch.setattr(
            "matplotlib.figure.Figure.savefig", lambda _, path, **__: Path(path).write_bytes(b"\x89PNG")
        )
