"""Photographs of solar cells, with a rare class, as a folder of folders; or with numbers, for regression.

    pip install elpv-dataset
    python examples/solar_cells.py data/cells
    hf-poolformer train --recipe demo --dataset_name data/cells --output_dir outputs/cells ...

    python examples/solar_cells.py data/ratings --numbers
    hf-poolformer train --task image-regression --recipe demo --dataset_name data/ratings \
        --output_dir outputs/ratings ...

2624 electroluminescence images of 300x300 pixels, rated by experts: 0, 1/3, 2/3 or 1 that the cell is defective
(https://github.com/zae-bayern/elpv-dataset, CC BY-NC-SA 4.0). As a class, 1/3 and less counts as functional. 70 % of
the images are for training, 15 % for validation and 15 % for the test.

    data/cells/train/defective/cell0000.png
    data/ratings/train/cell0000.png, data/ratings/train/metadata.csv: file_name, defect_probability
"""

import argparse
import csv
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image


SEED = 0
PARTS = {"train": 0.7, "validation": 0.15, "test": 0.15}
COLUMNS = ("file_name", "defect_probability")


def write(target: Path, numbers: bool = False) -> Counter[tuple[str, str]]:
    """Write the images of all splits; return images per split and class.

    Args:
        numbers: write the ratings into a table for each split, rather than the images into a folder for each class.

    Raises:
        ImportError: elpv-dataset is not installed.
        OSError: the folder cannot be written.
    """
    from elpv_dataset.utils import load_dataset

    images, ratings, _ = load_dataset()  # (N, 300, 300) uint8, (N,)
    splits = np.random.default_rng(SEED).choice(list(PARTS), len(images), p=list(PARTS.values()))
    counts: Counter[tuple[str, str]] = Counter()
    rows: dict[str, list[tuple[str, str]]] = {split: [] for split in PARTS}
    for number, (image, rating, split) in enumerate(zip(images, ratings, splits, strict=True)):
        kind, name = "defective" if rating > 0.5 else "functional", f"cell{number:04d}.png"
        folder = target / split if numbers else target / split / kind
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / name)
        rows[split].append((name, f"{rating:.4f}"))
        counts[split, kind] += 1
    for split in PARTS if numbers else ():
        with open(target / split / "metadata.csv", "w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([COLUMNS, *rows[split]])
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write photographs of solar cells, with classes or with numbers.")
    parser.add_argument("target", type=Path, help="folder for the images")
    parser.add_argument("--numbers", action="store_true", help="write the experts' ratings, not one folder per class")
    arguments = parser.parse_args()
    try:
        written = write(arguments.target, arguments.numbers)
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed: pip install elpv-dataset")
    except OSError as error:
        sys.exit(f"error: {error}")
    for split in PARTS:
        functional, defective = (written[split, kind] for kind in ("functional", "defective"))
        print(f"{arguments.target / split}: {functional} functional, {defective} defective")
