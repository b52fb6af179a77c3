"""Files on this machine, told by their names, and by their first bytes where names say nothing.

Needs nothing beyond the standard library and Pillow.
"""

import functools
import glob
import importlib.util
import logging
import os
import re
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path


logger = logging.getLogger(__name__)

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
HEIF_SUFFIXES = frozenset([".heic", ".heif", ".hif"])  # read where pillow-heif is installed
ARRAY_SUFFIX = ".npy"
PARQUET_SUFFIXES = frozenset([".parquet", ".geoparquet", ".gpq"])
TAR_SUFFIXES = frozenset([".tar"])

# Not looked into: what is certainly no photograph, and raw formats, whose TIFF header leads to a thumbnail.
_NEVER_IMAGES = re.compile(
    r"\.(7z|arrow|avi|csv|db|docx?|gz|h5|html?|ini|ipynb|json|jsonl|log|mat|md|mov|mp[34]|np[yz]|onnx|pdf|pkl|pth?|py|rst"
    r"|safetensors|sh|svg|toml|tsv|txt|wav|xlsx?|xml|ya?ml|zip|arw|cr[23]|dng|lsm|ndpi|nef|orf|pef|psd|raf|rw2|srw|svs)"
)
_SNIFFED_FORMATS = ("BMP", "GIF", "JPEG", "PNG", "TIFF", "WEBP")

# What storage systems, file managers and notebooks leave in every folder: thumbnails, deleted files, notes.
_LITTER_FOLDERS = frozenset(
    [
        "#recycle",
        "#snapshot",
        "$recycle.bin",
        "@eadir",
        "@recycle",
        "@recently-snapshot",
        "@tmp",
        "__macosx",
        "__pycache__",
        "found.000",
        "lost+found",
        "system volume information",
    ]
)
_LITTER_FILES = frozenset(["desktop.ini", "ehthumbs.db", "ehthumbs_vista.db", "icon\r", "thumbs.db"])

# Files by which a folder of results is known: of a training, an evaluation, an ablation; parts of predictions.
_RUN_FILES = frozenset(
    ["training_settings.yaml", "training_log.jsonl", "all_results.json", "ablation.json", "ablation.md"]
)
_PREDICTION_PART = re.compile(r"part-\d{5,}-of-\d{5,}-\d{5,}\.parquet")


@functools.cache
def image_suffixes() -> frozenset[str]:
    """Suffixes of the images that can be read here, in lower case."""
    return IMAGE_SUFFIXES | HEIF_SUFFIXES if importlib.util.find_spec("pillow_heif") else IMAGE_SUFFIXES


def is_image(file: Path) -> bool:
    """Told by the suffix, or by the first bytes where there is no suffix or one that nobody knows."""
    return file.suffix.lower() in image_suffixes() or _begins_like_an_image(file)


def image_files(files: Sequence[Path]) -> list[Path]:
    """The images among these files: of arrays (NPY) only where there are no others, whose features they may be."""
    images = [file for file in files if is_image(file)]
    return images or [file for file in files if file.suffix.lower() == ARRAY_SUFFIX]


def has_image_column(parquet: Path) -> bool:
    """Whether a Parquet file may hold images; if not, it is a table about those beside it."""
    import pyarrow as pa
    import pyarrow.parquet

    try:
        schema = pyarrow.parquet.read_schema(parquet)
    except (OSError, ValueError):
        return True  # reading it will say what is wrong
    kinds = [field.type for field in schema]
    return any(
        pa.types.is_binary(kind) or pa.types.is_large_binary(kind) or pa.types.is_struct(kind) for kind in kinds
    )


def list_files(root: Path) -> Iterator[Path]:
    """Every regular file under `root`, sorted, links followed; without hidden files, cycles and litter of systems.

    Folders that hold results of this package (a run, an evaluation, predictions) are left out as well, and a warning
    says so. Whoever wants one names it as the root.
    """
    seen = set()
    for directory, subdirectories, names in os.walk(root, followlinks=True):
        real = os.path.realpath(directory)
        if real in seen:
            subdirectories.clear()
            continue
        seen.add(real)
        if directory != os.fspath(root) and _holds_results(names):
            _tell_of_results(directory)
            subdirectories.clear()
            continue
        subdirectories[:] = sorted(name for name in subdirectories if not is_litter(name, folder=True))
        for name in sorted(names):
            if not is_litter(name):
                yield Path(directory, name)


def match_pattern(pattern: str) -> list[Path]:
    """What a glob pattern matches, sorted, less what `list_files` leaves out below the part without wildcards."""
    parts = Path(pattern).parts
    fixed = next((index for index, part in enumerate(parts) if glob.has_magic(part)), len(parts))
    results: dict[Path, bool] = {}

    def wanted(path: Path) -> bool:
        folders = [Path(*path.parts[:end]) for end in range(fixed + 1, len(path.parts) + 1)]
        for folder in folders:
            # Hidden files are the pattern's to match.
            if folder.name[0] != "." and (is_litter(folder.name, folder=True) or is_litter(folder.name)):
                return False
            if folder not in results:
                results[folder] = folder.is_dir() and _holds_results(os.listdir(folder))
                if results[folder]:
                    _tell_of_results(folder)
            if results[folder]:
                return False
        return True

    return [path for path in map(Path, sorted(glob.glob(pattern, recursive=True))) if wanted(path)]


def is_litter(name: str, folder: bool = False) -> bool:
    """Whether a name is a hidden one, or one that systems give to what is nobody's data."""
    lowered = name.lower()
    return name.startswith(".") or lowered in (_LITTER_FOLDERS if folder else _LITTER_FILES)


# What tells about the data and is no part of it; some of it is read elsewhere.
_ABOUT = frozenset(["README.md", "dataset_info.json", "dataset_infos.json", "id2label.json", "state.json"])


def count_by_suffix(files: Sequence[Path]) -> dict[str, int]:
    """How many files have which suffix, the most frequent first: `{".heic": 20, "without suffix": 1}`."""
    return dict(Counter(_kind(file) for file in files if file.name not in _ABOUT).most_common())


def counted(left_out: dict[str, int]) -> str:
    """`count_by_suffix` in words: "20 .heic, 3 .txt"."""
    return ", ".join(f"{count} {kind}" for kind, count in left_out.items())


def heif_hint(left_out: dict[str, int]) -> str:
    """What to install so that images that are left out are read; empty where nothing would help."""
    return " (pip install pillow-heif reads .heic)" if HEIF_SUFFIXES & left_out.keys() else ""


def is_saved_dataset(root: Path) -> bool:
    """Whether `save_to_disk` wrote this directory."""
    return (root / "dataset_dict.json").is_file() or (
        (root / "dataset_info.json").is_file() and (root / "state.json").is_file()
    )


def _holds_results(names: Sequence[str]) -> bool:
    return bool(
        _RUN_FILES.intersection(names)
        or {"config.json", "model.safetensors"}.issubset(names)
        or {"report.json", "images.parquet"}.issubset(names)
        or any(name.startswith("part-") and _PREDICTION_PART.fullmatch(name) for name in names)
    )


def _tell_of_results(folder: str | Path) -> None:
    logger.warning("%s holds results of a run: nothing in it is read as data", folder)


def _kind(file: Path) -> str:
    suffix = file.suffix.lower()
    return suffix if re.fullmatch(r"\.[a-z][a-z0-9_]{0,9}", suffix) else "without suffix"


def _begins_like_an_image(file: Path) -> bool:
    suffix = file.suffix.lower()
    if suffix in PARQUET_SUFFIXES | TAR_SUFFIXES or _NEVER_IMAGES.fullmatch(suffix):
        return False
    from PIL import Image

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file, formats=_SNIFFED_FORMATS):
                return True
    except Image.DecompressionBombError:
        return True  # the decoder will say so
    except Exception:  # parsers of foreign bytes raise anything at all
        return False
