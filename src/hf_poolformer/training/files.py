"""Files on this machine, told by their names. Needs nothing beyond the standard library."""

import os
from collections.abc import Iterator
from pathlib import Path


IMAGE_SUFFIXES = frozenset(
    [
        ".apng",
        ".avif",
        ".bmp",
        ".dib",
        ".gif",
        ".j2k",
        ".jfif",
        ".jp2",
        ".jpe",
        ".jpeg",
        ".jpg",
        ".jpx",
        ".pbm",
        ".pcx",
        ".pgm",
        ".png",
        ".pnm",
        ".ppm",
        ".sgi",
        ".tga",
        ".tif",
        ".tiff",
        ".webp",
    ]
)
PARQUET_SUFFIXES = frozenset([".parquet", ".geoparquet", ".gpq"])
TAR_SUFFIXES = frozenset([".tar"])


def list_files(root: Path) -> Iterator[Path]:
    """Every regular file under `root`, sorted, links followed, hidden ones and cycles left out."""
    seen = set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subdirectories.clear()
            continue
        seen.add(real)
        subdirectories[:] = sorted(name for name in subdirectories if not name.startswith("."))
        for name in sorted(names):
            if not name.startswith("."):
                yield Path(directory, name)


def is_saved_dataset(root: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (root / "dataset_dict.json").is_file() or (
        (root / "dataset_info.json").is_file() and (root / "state.json").is_file()
    )


def one_line(error: BaseException) -> str:
    """An exception's message on one line of at most 300 characters."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= 300 else text[:297] + "..."
