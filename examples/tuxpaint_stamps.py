"""Turn Tux Paint's stamps into two data sets for scripts/train_dense.py, in the layouts of COCO and ADE20K.

    apt install tuxpaint-stamps-default                        # Debian, Ubuntu
    pip install 'hf-poolformer[demo-dense]'
    python examples/tuxpaint_stamps.py data/stamps
    accelerate launch scripts/train_dense.py --task object-detection --recipe demo \
        --dataset_name data/stamps/detection --output_dir outputs/detection

The stamps are cut-outs: their alpha channel says exactly which pixels are the object. They are laid, turned and
resized by chance, on scikit-image's photographs; where one covers another, the mask of the lower one ends. Training
and validation images share the stamps; their backgrounds are different parts of the photographs.

    detection/     image, objects: bbox (x, y, width, height), category, segmentation (run lengths), area, iscrowd
    segmentation/  image, annotation (PNG: 0 background, 1 stamp), id2label.json; one stamp per image
"""

import argparse
import io
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import datasets
import numpy as np
import skimage.data
from datasets import ClassLabel, Features, Image, List, Value
from PIL import Image as PILImage
from pycocotools import mask as run_lengths
from tqdm import tqdm


STAMPS = Path("/usr/share/tuxpaint/stamps")
INSTALL = "apt install tuxpaint-stamps-default, or say where they are with --stamps"
CATEGORIES = ("animals", "food", "plants", "vehicles")
# motorcycle_right shows what stereo_motorcycle's left picture does, and stays out.
PHOTOGRAPHS = ("astronaut", "brick", "camera", "cat", "cell", "coffee", "coins", "grass", "gravel",
               "hubble_deep_field", "immunohistochemistry", "moon", "retina", "rocket",
               "stereo_motorcycle")  # fmt: skip
# The part of each photograph, from left to right, that serves as background: no pixel is in both.
PARTS = {"train": (0.0, 0.7), "validation": (0.7, 1.0)}
SHARDS = {"train": 4, "validation": 2}
FOREGROUND = 128  # alpha from which a pixel is the object's
EMPTY = 0.03  # images without any object
MOST_OBJECTS = 3
LONG_SIDE = {"detection": (0.3, 0.65), "segmentation": (0.5, 0.9)}  # of a stamp, in parts of the image's side
MOST_HIDDEN = 0.2  # of a stamp, by those above it


class Stamp(NamedTuple):
    category: int
    image: PILImage.Image  # RGBA, cut to what is visible


def read_stamps(folder: Path, categories: list[str] | None, side: int) -> tuple[list[Stamp], list[str]]:
    """All stamps with an alpha channel that cuts something out, and the names of their categories: the top folders.

    Stamps are made no larger than `side` pixels, which is more than is ever seen of them.

    Raises:
        FileNotFoundError: no stamps there.
        ValueError: a category that does not exist.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there are no stamps in {folder}: {INSTALL}")
    known = sorted(path.name for path in folder.iterdir() if path.is_dir())
    names = known if categories is None else sorted(set(categories))
    missing = [name for name in names if name not in known]
    if missing:
        raise ValueError(f"there is no category {missing[0]!r} in {folder}, only {', '.join(known) or 'nothing'}")
    stamps = []
    for category, name in enumerate(names):
        for path in sorted((folder / name).rglob("*.png")):
            with PILImage.open(path) as image:
                image = image.convert("RGBA")
            alpha = np.asarray(image)[..., 3] >= FOREGROUND
            if 0.01 < alpha.mean() < 0.98:
                top, bottom = np.flatnonzero(alpha.any(1))[[0, -1]]
                left, right = np.flatnonzero(alpha.any(0))[[0, -1]]
                image = image.crop((left, top, right + 1, bottom + 1))
                image.thumbnail((side, side), PILImage.Resampling.LANCZOS)
                stamps.append(Stamp(category, image))
    if not stamps:
        raise FileNotFoundError(f"there are no stamps with an alpha channel in {folder}: {INSTALL}")
    return stamps, names


def read_photographs(split: str) -> list[PILImage.Image]:
    """The split's part of each photograph."""
    parts = []
    for name in PHOTOGRAPHS:
        pixels = getattr(skimage.data, name)()
        image = PILImage.fromarray(pixels[0] if isinstance(pixels, tuple) else pixels).convert("RGB")
        left, right = (round(edge * image.width) for edge in PARTS[split])
        parts.append(image.crop((left, 0, right, image.height)))
    return parts


def background(photographs: list[PILImage.Image], side: int, rng: np.random.Generator) -> PILImage.Image:
    """A square part of a photograph, perhaps mirrored, `side` pixels wide."""
    image = photographs[rng.integers(len(photographs))]
    window = int(min(image.size) * rng.uniform(0.4, 1.0))
    left, top = (int(rng.integers(length - window + 1)) for length in image.size)
    box = (left, top, left + window, top + window)
    image = image.resize((side, side), PILImage.Resampling.BICUBIC, box=box)
    return image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT) if rng.random() < 0.5 else image


def varied(stamp: Stamp, long_side: float, rng: np.random.Generator) -> PILImage.Image:
    """The stamp's picture turned by up to 20 degrees, perhaps mirrored, `long_side` pixels long."""
    image = stamp.image
    if rng.random() < 0.5:
        image = image.transpose(PILImage.Transpose.FLIP_LEFT_RIGHT)
    image = image.rotate(rng.uniform(-20, 20), PILImage.Resampling.BICUBIC, expand=True)
    scale = long_side / max(image.size)
    return image.resize([max(1, round(length * scale)) for length in image.size], PILImage.Resampling.LANCZOS)


def compose(
    stamps: list[Stamp],
    photographs: list[PILImage.Image],
    side: int,
    count: int,
    sizes: tuple[float, float],
    rng: np.random.Generator,
) -> tuple[PILImage.Image, list[tuple[int, np.ndarray]]]:
    """An image, and for each object its category and the mask of its visible pixels, (side, side) of bool.

    A place is given up after some tries, so there may be fewer objects than `count`. `sizes` are the limits of an
    object's long side, in parts of the image's.
    """
    image = background(photographs, side, rng)
    objects: list[tuple[int, np.ndarray]] = []
    whole: list[int] = []  # pixels of each object before anything covered it
    for _ in range(count):
        stamp = stamps[rng.integers(len(stamps))]
        picture = varied(stamp, side * rng.uniform(*sizes), rng)
        for _ in range(20):
            place = [int(rng.integers(max(1, side - length + 1))) for length in picture.size]
            layer = PILImage.new("RGBA", image.size)
            layer.paste(picture, place)
            mask = np.asarray(layer)[..., 3] >= FOREGROUND
            left = [(known & ~mask).sum() for _, known in objects]
            if mask.any() and all(
                rest >= (1 - MOST_HIDDEN) * all_of for rest, all_of in zip(left, whole, strict=True)
            ):
                break
        else:
            continue
        image.paste(layer, mask=layer)
        objects = [(category, known & ~mask) for category, known in objects] + [(stamp.category, mask)]
        whole.append(int(mask.sum()))
    return image, objects


def encoded(image: PILImage.Image, kind: str, **options: int) -> dict[str, bytes | None]:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return {"bytes": buffer.getvalue(), "path": None}


def detection_row(index: int, image: PILImage.Image, objects: list[tuple[int, np.ndarray]]) -> dict:
    described = []
    for category, mask in objects:
        runs = run_lengths.encode(np.asfortranarray(mask, dtype=np.uint8))
        described.append(
            {
                "bbox": run_lengths.toBbox(runs).tolist(),
                "category": category,
                "segmentation": {"size": list(mask.shape), "counts": runs["counts"].decode()},
                "area": float(mask.sum()),
                "iscrowd": 0,
            }
        )
    picture = encoded(image, "JPEG", quality=92)
    return {"image_id": index, "image": picture, "width": image.width, "height": image.height, "objects": described}


def segmentation_row(image: PILImage.Image, objects: list[tuple[int, np.ndarray]]) -> dict:
    covered = np.zeros((image.height, image.width), np.uint8)
    for _, mask in objects:
        covered[mask] = 1
    return {
        "image": encoded(image, "JPEG", quality=92),
        "annotation": encoded(PILImage.fromarray(covered), "PNG", optimize=True),
    }


def rows(layout: str, split: str, count: int, stamps: list[Stamp], side: int, seed: int) -> Iterator[dict]:
    photographs = read_photographs(split)
    for index in tqdm(range(count), desc=f"{layout}, {split}", unit="image", disable=not sys.stderr.isatty()):
        # Each image has numbers of its own: it is the same whatever the number of the others.
        rng = np.random.default_rng([seed, list(SHARDS).index(split), layout == "detection", index])
        if layout == "segmentation":
            yield segmentation_row(*compose(stamps, photographs, side, 1, LONG_SIDE[layout], rng))
        else:
            objects = 0 if rng.random() < EMPTY else int(rng.integers(1, MOST_OBJECTS + 1))
            yield detection_row(index, *compose(stamps, photographs, side, objects, LONG_SIDE[layout], rng))


def features(layout: str, names: list[str]) -> Features:
    if layout == "segmentation":
        return Features({"image": Image(), "annotation": Image()})
    described = {
        "bbox": List(Value("float32"), length=4),
        "category": ClassLabel(names=names),
        "segmentation": {"size": List(Value("int32"), length=2), "counts": Value("string")},
        "area": Value("float32"),
        "iscrowd": Value("int8"),
    }
    sizes = {"width": Value("int32"), "height": Value("int32")}
    return Features({"image_id": Value("int64"), "image": Image(), **sizes, "objects": List(described)})


def build(
    target: Path,
    *,
    source: Path = STAMPS,
    categories: list[str] | None = None,
    side: int = 128,
    counts: dict[str, int],
    seed: int = 0,
) -> tuple[int, list[str]]:
    """Writes both data sets below `target`; returns the number of stamps used and the names of the categories."""
    stamps, names = read_stamps(source, categories, side)
    for layout in ("detection", "segmentation"):
        folder = target / layout
        folder.mkdir(parents=True, exist_ok=True)
        for earlier in folder.glob("*-?????-of-?????.parquet"):
            earlier.unlink()
        for split, count in counts.items():
            made = list(rows(layout, split, count, stamps, side, seed))
            shards = min(SHARDS[split], max(count, 1))
            for k, part in enumerate(np.array_split(np.arange(count), shards)):
                shard = datasets.Dataset.from_list([made[row] for row in part], features=features(layout, names))
                name = f"{split}-{k:05d}-of-{shards:05d}.parquet"
                # A shard gets its name when it is whole, so that a broken-off one is not taken for it.
                shard.to_parquet(folder / f".{name}")
                os.replace(folder / f".{name}", folder / name)
    id2label = json.dumps({0: "background", 1: "stamp"})
    (target / "segmentation" / "id2label.json").write_text(id2label + "\n", encoding="utf-8")
    return len(stamps), names


def main() -> int:
    parser = argparse.ArgumentParser(description="Turn Tux Paint's stamps into a detection and a segmentation set.")
    parser.add_argument("target", type=Path, help="folder for the two data sets")
    parser.add_argument("--stamps", type=Path, default=STAMPS, help="where the stamps are (default: %(default)s)")
    parser.add_argument(
        "--categories", nargs="+", default=list(CATEGORIES), metavar="NAME", help="top folders to use, or: all"
    )
    parser.add_argument("--side", type=int, default=128, help="of the square images, in pixels (default: %(default)s)")
    parser.add_argument("--train", type=int, default=2000, help="training images (default: %(default)s)")
    parser.add_argument("--validation", type=int, default=200, help="validation images (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.side < 32 or arguments.train < 1 or arguments.validation < 1:
        parser.error("--side must be at least 32, --train and --validation at least 1")
    datasets.disable_progress_bars()
    counts = {"train": arguments.train, "validation": arguments.validation}
    categories = None if arguments.categories == ["all"] else arguments.categories
    try:
        count, names = build(
            arguments.target,
            source=arguments.stamps,
            categories=categories,
            side=arguments.side,
            counts=counts,
            seed=arguments.seed,
        )
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"{count} stamps of {len(names)} categories ({', '.join(names)}) on scikit-image's photographs")
    for layout in ("detection", "segmentation"):
        print(
            f"{arguments.target / layout}: "
            + ", ".join(f"{number} {split} images" for split, number in counts.items())
        )
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
