"""The main job, on data that needs no network: train a PoolFormer on scikit-learn's handwritten digits and use it.

    python scripts/demo.py            what `make demo` runs

Writes the digits once as Parquet shards, trains on a stream of them with `accelerate launch scripts/train.py`, has
`scripts/evaluate.py` measure the saved model again, loads it through `pipeline("image-classification", ...)` and draws
its predictions. Flags that are not listed under --help go to scripts/train.py, e.g. `--num_train_epochs 5`.
"""

import argparse
import json
import os
import sys
import time
from collections.abc import Sequence
from pathlib import Path


# The demo's point is that it needs no network; set before anything reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
import matplotlib
import numpy as np
from demo_steps import run, start
from PIL import Image
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from transformers import pipeline

import hf_poolformer  # noqa: F401  (the pipeline below finds our classes)


matplotlib.use("Agg")
import matplotlib.pyplot as plt


datasets.disable_progress_bars()

SCRIPTS = Path(__file__).resolve().parent
SHARDS = {"train": 4, "test": 2}
TABLE_ROWS = 10
GRID = (5, 10)  # rows, columns of the picture

RED, GREY = "#c62828", "#424242"


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a PoolFormer on handwritten digits, evaluate it and use it.",
        epilog="Other flags go to scripts/train.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/demo-data"), help="where the digits are kept")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo"), help="where the model goes")
    parser.add_argument("--min_accuracy", type=float, default=0.97, help="below this the demo counts as failed")
    arguments, train_flags = parser.parse_known_args()
    data_dir, output_dir = arguments.data_dir, arguments.output_dir

    started = time.perf_counter()
    heading(1, f"the digits, as Parquet shards in {data_dir}")
    write_digits(data_dir)

    heading(2, "training on a stream of them")
    data_flags = ["--dataset_name", str(data_dir)]
    # Everything accelerate would otherwise take from a configuration file of the user's, and warn about.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no"]
    train = [str(SCRIPTS / "train.py"), "--recipe", "demo", "--output_dir", str(output_dir), "--overwrite_output_dir"]
    run([*launch, *train, *data_flags, *train_flags])
    trained = json.loads((output_dir / "all_results.json").read_text())

    heading(3, "measuring the saved model again")
    evaluation_dir = output_dir / "evaluation"
    run(
        [
            sys.executable,
            str(SCRIPTS / "evaluate.py"),
            str(output_dir),
            *data_flags,
            "--output_dir",
            str(evaluation_dir),
        ]
    )
    evaluated = json.loads((evaluation_dir / "all_results.json").read_text())

    heading(4, 'using it: pipeline("image-classification", ...)')
    files = str(data_dir / "test-*.parquet")
    test = datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)
    names = test.features["label"].names
    images, labels = zip(*((row["image"], names[row["label"]]) for row in test), strict=True)
    classify = pipeline("image-classification", model=str(output_dir), top_k=3, batch_size=64)
    predictions = classify(list(images))
    print_table(labels, predictions)
    right = sum(prediction[0]["label"] == label for prediction, label in zip(predictions, labels, strict=True))
    picture = output_dir / "predictions.png"
    draw(picture, images, labels, predictions)

    heading(5, f"done in {time.perf_counter() - started:.0f} s")
    print(
        f"accuracy    {trained['eval_accuracy']:.4f} after training, {evaluated['eval_accuracy']:.4f} by evaluate.py,"
    )
    print(f"            {right / len(labels):.4f} through the pipeline ({right} of {len(labels)} test images)")
    print(f"model       {output_dir} (its card: {output_dir / 'README.md'})")
    print(f"pictures    {picture}, {output_dir / 'curves.png'}, {output_dir / 'confusion_matrix.png'}")
    print(f"figures     {output_dir / 'all_results.json'}")
    if right / len(labels) < arguments.min_accuracy:
        print(f"error: the accuracy is below {arguments.min_accuracy}", file=sys.stderr)
        return 1
    return 0


def heading(number: int, text: str) -> None:
    print(f"\n[{number}/5] {text}", flush=True)


def write_digits(folder: Path) -> None:
    """Write 1797 digits (PNG, 8 x 8) to `train-*.parquet` and `test-*.parquet`, a fifth of each class for testing."""
    names = [f"{split}-{k:05d}-of-{n:05d}.parquet" for split, n in SHARDS.items() for k in range(n)]
    if all((folder / name).is_file() for name in names):
        print("already there")
        return
    digits = load_digits()
    pixels = np.rint(digits.images * (255 / 16)).astype(np.uint8)  # (1797, 8, 8), values 0..16 -> 0..255
    train, test = train_test_split(np.arange(len(pixels)), test_size=0.2, stratify=digits.target, random_state=0)
    features = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=[str(name) for name in digits.target_names])}
    )
    folder.mkdir(parents=True, exist_ok=True)
    part = folder / ".part"  # a shard gets its name when it is whole, so that a broken-off one is not taken for it
    part.mkdir(exist_ok=True)
    for split, rows in (("train", train), ("test", test)):
        dataset = datasets.Dataset.from_dict(
            {"image": [Image.fromarray(pixels[row]) for row in rows], "label": digits.target[rows]}, features=features
        )
        count = SHARDS[split]
        for k in range(count):
            shard = dataset.shard(count, k, contiguous=True)
            name = f"{split}-{k:05d}-of-{count:05d}.parquet"
            shard.to_parquet(part / name)
            (part / name).replace(folder / name)
    part.rmdir()
    print(f"{len(train)} images to train on in {SHARDS['train']} shards, {len(test)} to test on in {SHARDS['test']}")


def print_table(labels: Sequence[str], predictions: list[list[dict]]) -> None:
    print(f"{'digit':>5}  {'predicted':>9}  {'score':>6}  next best")
    for label, (best, *others) in list(zip(labels, predictions, strict=True))[:TABLE_ROWS]:
        mark = "" if best["label"] == label else "  <- wrong"
        rest = ", ".join(f"{other['label']} ({other['score']:.3f})" for other in others)
        print(f"{label:>5}  {best['label']:>9}  {best['score']:6.3f}  {rest}{mark}")


def draw(path: Path, images: Sequence[Image.Image], labels: Sequence[str], predictions: list[list[dict]]) -> None:
    """A grid of test images with predicted and true digit: the wrong ones first, in red, then the others in order."""
    wrong = [index for index, label in enumerate(labels) if predictions[index][0]["label"] != label]
    right = [index for index in range(len(labels)) if index not in set(wrong)]
    rows, columns = GRID
    figure, axes = plt.subplots(rows, columns, figsize=(1.25 * columns, 1.55 * rows + 0.5), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for axis, index in zip(axes.flat, wrong + right, strict=False):
        best = predictions[index][0]
        is_wrong = best["label"] != labels[index]
        axis.imshow(images[index], cmap="gray")
        axis.set_title(
            f"{best['label']}  {best['score']:.2f}\ntrue: {labels[index]}",
            fontsize=9,
            color=RED if is_wrong else GREY,
            fontweight="bold" if is_wrong else "normal",
        )
    shown = min(len(wrong), rows * columns)
    figure.suptitle(
        f"predicted digit and score; {len(wrong)} of {len(labels)} test images are wrong"
        + (f", {'all' if shown == len(wrong) else shown} of them here in red" if wrong else "")
    )
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    start(main)
