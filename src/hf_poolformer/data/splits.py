"""Which folders are splits, which are classes, and when that cannot be told."""

import logging
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from ..foundation.errors import UserError
from .columns import few
from .files import HEIF_SUFFIXES, count_by_suffix, counted, is_litter


logger = logging.getLogger(__name__)

SPLIT_ALIASES = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "val", "dev"),
    "test": ("test", "testing", "eval", "evaluation"),
}

_CANONICAL = {alias: name for name, aliases in SPLIT_ALIASES.items() for alias in aliases}
# Words that add nothing to the name of a split: training_set, val images, test-data.
_FILLERS = (
    *("annotations", "data", "dataset", "files", "folder", "images", "image", "imgs", "img", "instances", "labels"),
    *("metadata", "photos", "pictures", "set", "split"),
)
_GLUED = re.compile(rf"({'|'.join(_CANONICAL)})(?:{'|'.join(_FILLERS)})")
# How far the name of a folder says that it is a split.
_EXACT, _PLAIN, _WORD = 0, 1, 2


@dataclass
class Folders:
    """Images by split, each with the name of its class, None where there are no classes.

    Attributes:
        origins: split -> the folder it was found in.
        left_out: images in folders that belong to no split.
    """

    files: dict[str, list[tuple[Path, str | None]]]
    origins: dict[str, str]
    left_out: list[Path] = field(default_factory=list)


def canonical(split: str) -> str:
    """`validation` for `val`, and so on; a name that is no alias stays as it is."""
    return _CANONICAL.get(split.lower(), split)


def split_finder(extra_splits: Iterable[str]) -> Callable[[str], str | None]:
    """A function from the name of a folder or file, or a word of it, to the split that it means beyond doubt."""
    extra = frozenset(extra_splits)

    def split_of(name: str) -> str | None:
        if name in extra:
            return name
        split, sureness = _judge(name)
        return split if sureness < _WORD else None

    return split_of


def parts_below(base: Path) -> Callable[[Path], list[str]]:
    """As `path.relative_to(base).parts`, for a million paths."""
    text = os.fspath(base)
    start = 0 if text == os.curdir else len(text.rstrip(os.sep)) + 1
    return lambda path: os.fspath(path)[start:].split(os.sep)


def read_folders(
    root: Path, images: Sequence[Path], others: Sequence[Path], extra_splits: Iterable[str], whole: bool
) -> Folders:
    """Splits and classes as the folders tell them.

    Splits are looked for in the first directory that has more than one entry. Folders beside them that are none are
    left out, with a warning, if the splits are beyond doubt.

    Args:
        others: files that are no images, for what there is to say of folders that hold nothing else.
        whole: everything is one split, `train`, whatever the names say.

    Raises:
        UserError: splits and classes cannot be told apart; images beside the folders of the classes; all images of a
            class are of a kind that another package would read.
    """
    found = None if whole else _find_splits(root, images, extra_splits)
    if found is None:
        by_class = None if whole else _splits_within_classes(root, images)
        if by_class is not None:
            return by_class
        return Folders({"train": _with_classes(root, images, others)}, {"train": "everything there is"})
    base, splits, left_out = found
    files = {split: _with_classes(base / top, members, others) for split, (top, members) in splits.items()}
    known = {label for _, label in files.get("train", ())}
    for split, members in files.items():
        labels = {label for _, label in members}
        if len(labels) == 1 and len(known) > 1 and not labels & known:
            # test/test/1.jpg: the second directory is no class.
            files[split] = [(file, None) for file, _ in members]
    return Folders(files, {split: f"folder {top}" for split, (top, _) in splits.items()}, left_out)


def _judge(name: str) -> tuple[str | None, int]:
    """The split in a name, and how sure that is."""
    if name.lower() in _CANONICAL:
        return canonical(name), _EXACT
    words = [word for word in re.split(r"[\W\d_]+", re.sub(r"(?<=[a-z])(?=[A-Z])", " ", name).lower()) if word]
    stems = [glued[1] if (glued := _GLUED.fullmatch(word)) else word for word in words]
    splits = {_CANONICAL[stem] for stem in stems if stem in _CANONICAL}
    if len(splits) != 1:
        return None, _WORD
    plain = all(stem in _CANONICAL or stem in _FILLERS for stem in stems)
    return splits.pop(), _PLAIN if plain else _WORD


def _by_top(base: Path, images: Sequence[Path]) -> dict[str | None, list[Path]]:
    """Images by the directory below `base` that they lie in, None for those directly there."""
    by_top: dict[str | None, list[Path]] = {}
    parts_of = parts_below(base)
    for image in images:
        parts = parts_of(image)
        by_top.setdefault(parts[0] if len(parts) > 1 else None, []).append(image)
    return by_top


def _find_splits(
    root: Path, images: Sequence[Path], extra_splits: Iterable[str]
) -> tuple[Path, dict[str, tuple[str, list[Path]]], list[Path]] | None:
    """Where the splits lie, split -> (directory, images), and images beside; None where there are no splits."""
    base = root
    while True:
        by_top = _by_top(base, images)
        chosen = _splits_among(base, by_top, frozenset(extra_splits))
        if chosen:
            break
        if len(by_top) > 1 or None in by_top:
            return None
        base = base / next(iter(by_top))
    rest = {top: members for top, members in by_top.items() if top not in chosen.values()}
    if rest:
        shown = few([f"{'files directly in it' if top is None else top} ({len(rest[top])})" for top in rest])
        logger.warning(
            "%s: the splits are %s; images elsewhere are left out: %s", base, few(list(chosen.values())), shown
        )
    splits = {split: (top, by_top[top]) for split, top in chosen.items()}
    return base, splits, [image for members in rest.values() for image in members]


def _splits_among(base: Path, by_top: dict[str | None, list[Path]], extra: frozenset[str]) -> dict[str, str]:
    """split -> directory, empty where the directories are classes."""
    tops = [top for top in by_top if top is not None]
    inner = {top: {below for below in _by_top(base / top, by_top[top]) if below is not None} for top in tops}
    declared = {top: top for top in tops if top in extra and top.lower() not in _CANONICAL}
    named = {top: _judge(top) for top in tops if top not in declared}
    chosen: dict[str, str] = dict(declared)
    twice: list[tuple[str, str]] = []
    for sureness in (_EXACT, _PLAIN, _WORD):
        for top, (split, how) in named.items():
            if how != sureness or split is None:
                continue
            if split in chosen:
                if sureness < _WORD and named.get(chosen[split], (None, _WORD))[1] == sureness:
                    twice.append((chosen[split], top))
            # One word among others says too little, unless another split has the same classes: imagenet-train,
            # imagenet-val, but not "freight train", "test tube".
            elif sureness < _WORD or any(
                inner[top] & inner[other]
                for other, (another, _) in named.items()
                if another not in (None, split) and other != top
            ):
                chosen[split] = top
    if not chosen:
        return {}
    rest = [top for top in by_top if top not in chosen.values()]
    if twice and (declared or all(top is None or named.get(top, (None, 0))[0] for top in rest)):
        raise UserError(f"{base} has two directories for one split: {twice[0][0]} and {twice[0][1]}")
    if not rest or declared:
        return chosen
    nested = [top for top in chosen.values() if inner[top]]
    classes = {name for top in nested for name in inner[top]}
    folders = [top for top in rest if top is not None]
    if not nested:
        if not folders:
            return chosen
        if list(chosen) == ["train"] and len(folders) > 1:
            logger.warning("%s: the folder %s counts as a class, like those beside it", base, chosen["train"])
            return {}
        raise UserError(
            f"{base} has folders named like splits ({few(list(chosen.values()))}) beside others ({few(folders)}), "
            "and no folders for classes in them: is each of them a class, or a split? Move away what is no class, or "
            "rename it if it is one; or put the classes of each split into it (train/cat, train/dog)"
        )
    clear = len(chosen) > 1 and not classes & set(folders)
    alone = list(chosen) == ["train"] and len(folders) < 2 and not any(inner[top] & classes for top in folders)
    if clear or (alone and not classes & set(folders)):
        return chosen
    flags = {"train": "--train_dir", "validation": "--validation_dir", "test": "--validation_dir"}
    named_by_flags = {
        flags[split]: f"{flags[split]} {base / chosen[split]}" for split in SPLIT_ALIASES if split in chosen
    }
    raise UserError(
        f"{base} has folders that look like splits ({few(list(chosen.values()))}) beside folders that look like "
        f"classes ({few(folders)}), so which are meant cannot be told: name the splits "
        f"({' '.join(named_by_flags.values())}), or move the others away"
    )


def _splits_within_classes(root: Path, images: Sequence[Path]) -> Folders | None:
    """cat/train/1.jpg, cat/val/2.jpg, dog/train/3.jpg: splits below the classes; None where that is not so."""
    if not any(part.lower() in _CANONICAL for part in images[0].relative_to(root).parts[:-1]):
        return None
    files: dict[str, list[tuple[Path, str | None]]] = {}
    parts_of = parts_below(Path(os.path.commonpath([image.parent for image in images])))
    for image in images:
        parts = parts_of(image)
        if len(parts) < 3 or parts[1].lower() not in _CANONICAL:
            return None
        files.setdefault(canonical(parts[1]), []).append((image, parts[0]))
    if "train" not in files or len(files) < 2:
        return None
    return Folders(files, {split: f"folders {split} in those of the classes" for split in files})


def _with_classes(root: Path, images: Sequence[Path], others: Sequence[Path]) -> list[tuple[Path, str | None]]:
    parts_of = parts_below(root)
    relative = [parts_of(image) for image in images]
    # A lone directory between the root and the classes (dataset/images/cat/1.jpg) says nothing.
    depth = 0
    while len({parts[depth] for parts in relative}) == 1 and all(len(parts) > depth + 2 for parts in relative):
        depth += 1
    loose = [image for image, parts in zip(images, relative, strict=True) if len(parts) == depth + 1]
    if len(loose) == len(images):
        return [(image, None) for image in images]
    if loose:
        raise UserError(
            f"{root} has {len(loose)} images beside its class directories, {loose[0].name} for one: "
            "move them into a directory named after their class, or away"
        )
    deeper: dict[str, set[str]] = {}
    for parts in relative:
        if len(parts) > depth + 2:
            deeper.setdefault(parts[depth], set()).add(parts[depth + 1])
    if deeper:
        name, below = next(iter(deeper.items()))
        logger.warning(
            "%s: the classes are %s; sub-folders count as part of them, in %s: %s",
            root,
            few(sorted({parts[depth] for parts in relative})),
            name,
            few(sorted(below)),
        )
    level = root.joinpath(*relative[0][:depth])
    _look_for_empty_classes(level, {parts[depth] for parts in relative}, others)
    return [(image, parts[depth]) for image, parts in zip(images, relative, strict=True)]


def _look_for_empty_classes(level: Path, classes: set[str], others: Sequence[Path]) -> None:
    """Names the folders beside those of the classes that hold no image that could be read."""
    held: dict[str, list[Path]] = {}
    with os.scandir(level) as entries:
        for entry in entries:
            if entry.is_dir() and entry.name not in classes and not is_litter(entry.name, folder=True):
                held[entry.name] = []
    for file in others if held else ():
        if level in file.parents:
            held.get(file.relative_to(level).parts[0], []).append(file)
    for name, files in sorted(held.items()):
        kinds = count_by_suffix(files)
        if HEIF_SUFFIXES & kinds.keys():
            raise UserError(
                f"{level / name} would be no class: none of its images can be read here ({counted(kinds)}). "
                "pip install pillow-heif reads them; or move the folder away"
            )
        if not files and any(names for _, _, names in os.walk(level / name)):
            continue  # hidden files, or the results of a run, of which list_files has told
        logger.warning("%s is no class: it holds no image (%s)", level / name, counted(kinds) or "no files")
