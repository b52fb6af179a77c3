"""Turn Fashion-MNIST's idx files into Parquet shards that scripts/train.py streams.

    apt install dataset-fashion-mnist                         # Debian, Ubuntu; or download the four files
    python examples/fashion_mnist.py data/fashion_mnist
    accelerate launch scripts/train.py --recipe demo --dataset_name data/fashion_mnist --output_dir outputs/fashion

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


def convert(source: Path, target: Path) -> dict[str, int]:
    """Write `train-*.parquet` and `test-*.parquet` with an Image and a ClassLabel column; return images per split."""
    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=CLASSES)})
    target.mkdir(parents=True, exist_ok=True)
    counts = {}
    for split, (prefix, shards) in SPLITS.items():
        images = read_idx(find(source, f"{prefix}-images-idx3-ubyte"))  # (N, 28, 28)
        labels = read_idx(find(source, f"{prefix}-labels-idx1-ubyte"))  # (N,)
        for k, rows in enumerate(np.array_split(np.arange(len(images)), shards)):
            columns = {"image": [Image.fromarray(images[row]) for row in rows], "label": labels[rows]}
            shard = datasets.Dataset.from_dict(columns, features=features)
            shard.to_parquet(target / f"{split}-{k:05d}-of-{shards:05d}.parquet")
        counts[split] = len(images)
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Turn Fashion-MNIST's idx files into Parquet shards.")
    parser.add_argument("target", type=Path, help="folder for the shards")
    parser.add_argument("--source", type=Path, default=Path("/usr/share/datasets/fashion-mnist"))
    arguments = parser.parse_args()
    datasets.disable_progress_bars()
    try:
        written = convert(arguments.source, arguments.target)
    except (OSError, ValueError) as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.target}: " + ", ".join(f"{count} {split} images" for split, count in written.items()))
