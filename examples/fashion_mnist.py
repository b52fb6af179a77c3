"""Turn Fashion-MNIST's idx files into Parquet shards that scripts/train.py streams.

    apt install dataset-fashion-mnist                         # Debian, Ubuntu; or download the four files
    python examples/fashion_mnist.py data/fashion_mnist
    accelerate launch scripts/train.py --recipe demo --dataset_name data/fashion_mnist --output_dir outputs/fashion

With `--outfits`, each image holds two to four items and has several labels:

    python examples/fashion_mnist.py data/outfits --outfits
    accelerate launch scripts/train.py --task multi-label-classification --recipe demo --image_size 64 \
        --dataset_name data/outfits --output_dir outputs/outfits

The same lines serve for every dataset in idx format: MNIST, KMNIST, EMNIST.
"""

import argparse
import gzip
import sys
import zlib
from pathlib import Path

import datasets
import numpy as np
from PIL import Image


CLASSES = ["T-shirt/top", "Trouser", "Pullover", "Dress", "Coat", "Sandal", "Shirt", "Sneaker", "Bag", "Ankle boot"]
SPLITS = {"train": ("train", 8), "test": ("t10k", 2)}  # split -> (prefix of the idx files, number of shards)
SEED = 0
CANVAS, SIDE, ITEMS = 64, 28, (2, 3, 4)  # pixels of an outfit, pixels of an item, items in an outfit
RARE = 0.2  # of the items of the last class those that are shown at all; of the first, all


def read_idx(path: Path) -> np.ndarray:
    """An idx file of unsigned bytes, gzipped or not: two zeros, type 8, rank, big-endian sizes, then the data.

    Raises:
        ValueError: the file is something else, or cut off.
    """
    data = path.read_bytes()
    if data[:2] == b"\x1f\x8b":
        try:
            data = gzip.decompress(data)
        except (EOFError, OSError, zlib.error) as error:
            raise ValueError(f"{path} is damaged: {error}") from error
    if len(data) < 4 or data[:3] != b"\0\0\x08":
        raise ValueError(f"{path} is not an idx file of unsigned bytes")
    rank = data[3]
    shape = tuple(np.frombuffer(data, ">u4", rank, offset=4).tolist())
    values = np.frombuffer(data, np.uint8, offset=4 + 4 * rank)
    if values.size != np.prod(shape):
        raise ValueError(f"{path} announces {shape} but holds {values.size} bytes")
    return values.reshape(shape)


def find(folder: Path, name: str) -> Path:
    for path in (folder / f"{name}.gz", folder / name):
        if path.is_file():
            return path
    raise FileNotFoundError(f"{folder / name}.gz is missing; apt install dataset-fashion-mnist, or give --source")


def outfits(images: np.ndarray, labels: np.ndarray, rng: np.random.Generator) -> tuple[np.ndarray, list[list[int]]]:
    """Lay items side by side, on canvases with room for four, and give the classes on each.

    Args:
        images: (N, 28, 28) uint8.
        labels: (N,).

    Returns:
        (M, 64, 64) uint8, and M sorted lists of classes. Later classes are rarer, so that thresholds matter.
    """
    shown = rng.random(len(labels)) < np.linspace(1, RARE, len(CLASSES))[labels]
    order = rng.permutation(np.flatnonzero(shown))
    canvases, classes = [], []
    while len(order) >= max(ITEMS):
        number = rng.choice(ITEMS)
        items, order = order[:number], order[number:]
        canvas = np.zeros((CANVAS, CANVAS), np.uint8)
        for item, cell in zip(items, rng.permutation(4), strict=False):
            top, left = np.array(divmod(cell, 2)) * (CANVAS // 2) + rng.integers(0, CANVAS // 2 - SIDE + 1, 2)
            canvas[top : top + SIDE, left : left + SIDE] = images[item]
        canvases.append(canvas)
        classes.append(np.unique(labels[items]).tolist())
    return np.stack(canvases), classes


def convert(source: Path, target: Path, several: bool = False) -> dict[str, int]:
    """Write `train-*.parquet` and `test-*.parquet` with an Image and a ClassLabel column; return images per split.

    Args:
        several: write `outfits`, whose column `labels` lists the classes of each image.
    """
    label, name = datasets.ClassLabel(names=CLASSES), "labels" if several else "label"
    features = datasets.Features({"image": datasets.Image(), name: datasets.List(label) if several else label})
    target.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, (prefix, shards) in SPLITS.items():
        images = read_idx(find(source, f"{prefix}-images-idx3-ubyte"))  # (N, 28, 28)
        labels = read_idx(find(source, f"{prefix}-labels-idx1-ubyte")).tolist()  # (N,)
        if several:
            images, labels = outfits(images, np.array(labels), np.random.default_rng(SEED))
        for k, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
            columns = {"image": [Image.fromarray(images[row]) for row in rows], name: [labels[row] for row in rows]}
            shard = datasets.Dataset.from_dict(columns, features=features)
            shard.to_parquet(target / f"{split}-{k:05d}-of-{shards:05d}.parquet")
        counts[split] = len(images)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Turn Fashion-MNIST's idx files into Parquet shards.")
    parser.add_argument("target", type=Path, help="folder for the shards")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    parser.add_argument("--outfits", action="store_true", help="two to four items, and so several labels, per image")
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    try:
        written = convert(arguments.source, arguments.target, arguments.outfits)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.target}: " + ", ".join(f"{count} {split} images" for split, count in written.items()))
