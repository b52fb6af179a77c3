"""Which room may know which: imports go one way, and what lies flat in the package can travel to the Hub."""

import ast
from pathlib import Path

import pytest

import hf_poolformer


PACKAGE = Path(hf_poolformer.__file__).parent
# Each room may import from those before it. Flat files come first: they import each other only.
ROOMS = [
    "foundation",
    "settings",
    "data",
    "conversion",
    "hub",
    "export",
    "evaluation",
    "training",
    "prediction",
    "explanation",
    "reports",
    "app",
    "benchmark",
    "commands",
]
# The public names of the package, given out when they are asked for; formulas that find their kernels.
LAZY = {"__init__.py", "ops.py", "backends.py", "pipelines.py"}


def imports_of(path: Path) -> list[str]:
    """Dotted names below the package that a file imports."""
    package = path.relative_to(PACKAGE).parts[:-1]
    found = []
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            if node.level:
                base = [*package[: len(package) - node.level + 1], *(node.module or "").split(".")]
            elif (node.module or "").split(".")[0] == "hf_poolformer":
                base = node.module.split(".")[1:]
            else:
                continue
            base = [part for part in base if part]
            found += [".".join([*base, alias.name]) for alias in node.names]
        elif isinstance(node, ast.Import):
            found += [alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("hf_poolformer.")]
    return found


def test_every_room_has_its_place():
    rooms = {path.name for path in PACKAGE.iterdir() if path.is_dir() and (path / "__init__.py").is_file()}
    assert rooms == {*ROOMS, "kernels"}


@pytest.mark.parametrize("room", ROOMS)
def test_imports_go_one_way(room):
    later = set(ROOMS[ROOMS.index(room) + 1 :])
    wrong = [
        f"{path.relative_to(PACKAGE)}: {name}"
        for path in sorted((PACKAGE / room).rglob("*.py"))
        for name in imports_of(path)
        if name.split(".")[0] in later
    ]
    assert not wrong


def test_flat_files_stand_alone():
    wrong = [
        f"{path.name}: {name}"
        for path in sorted(PACKAGE.glob("*.py"))
        if path.name not in LAZY
        for name in imports_of(path)
        if name.split(".")[0] in ROOMS
    ]
    assert not wrong
