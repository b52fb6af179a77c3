"""Photographs of solar cells as a folder of folders, one for each class: the layout that people's own photos have.

    pip install elpv-dataset
    python examples/solar_cells.py data/cells
    hf-poolformer train --recipe demo --train_dir data/cells --train_val_split 0.2 --output_dir outputs/cells ...

2624 electroluminescence images of 300x300 pixels, rated by experts: 0, 1/3, 2/3 or 1 that the cell is defective
(https://github.com/zae-bayern/elpv-dataset, CC BY-NC-SA 4.0). Here 1/3 and less counts as functional.
"""

import argparse
import sys
from pathlib import Path

from PIL import Image


def write(target: Path) -> dict[str, int]:
    """Write `target/functional/*.png` and `target/defective/*.png`; return images per class.

    Raises:
        ImportError: elpv-dataset is not installed.
        OSError: the folder cannot be written.
    """
    from elpv_dataset.utils import load_dataset

    counts = {"functional": 0, "defective": 0}
    images, ratings, _ = load_dataset()  # (N, 300, 300) uint8, (N,)
    for number, (image, rating) in enumerate(zip(images, ratings, strict=True)):
        name = "defective" if rating > 0.5 else "functional"
        folder = target / name
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(folder / f"cell{number:04d}.png")
        counts[name] += 1
    return counts


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description="Write photographs of solar cells into one folder per class.")
    parser.add_argument("target", type=Path, help="folder for the folders")
    arguments = parser.parse_args()
    try:
        written = write(arguments.target)
    except ImportError as error:
        sys.exit(f"error: {error.name} is not installed: pip install elpv-dataset")
    except OSError as error:
        sys.exit(f"error: {error}")
    print(f"{arguments.target}: " + ", ".join(f"{count} {name}" for name, count in written.items()))
