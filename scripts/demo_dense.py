"""Segmentation and detection on data that needs no network: Tux Paint's stamps on scikit-image's photographs.

    python scripts/demo_dense.py      what `make demo-dense` runs

Composes the data set (examples/tuxpaint_stamps.py), trains Semantic FPN, RetinaNet and Mask R-CNN on streams of it
with `accelerate launch scripts/train_dense.py`, each from the backbone of the one before, and uses the saved models
through transformers' pipelines. Flags that are not listed under --help go to each training.
"""

import argparse
import json
import os
import sys
import time
from pathlib import Path


# The demo's point is that it needs no network; set before anything reads it.
os.environ.setdefault("HF_HUB_OFFLINE", "1")

import datasets
from demo_steps import run, start
from transformers import pipeline

import hf_poolformer  # noqa: F401  (the pipelines below find our classes)


datasets.disable_progress_bars()

ROOT = Path(__file__).resolve().parents[1]
# Few and unlike, so that minutes are enough to tell them apart.
CATEGORIES = ("animals", "food")
# Task, folder of the data, heads of the small model beside the backbone that it starts from, result that counts,
# what it should reach at least.
PYRAMID = {"fpn_feature_size": 64, "max_detections": 20}
REGIONS = {"box_head_hidden_size": 256, "mask_head_num_convs": 2, "rpn_num_proposals": 200, "rpn_batch_size": 128}
STAGES = (
    ("semantic-segmentation", "segmentation", {}, "eval_miou", 0.8),
    ("object-detection", "detection", PYRAMID, "eval_map_50", 0.5),
    ("instance-segmentation", "detection", {**PYRAMID, **REGIONS, "roi_batch_size": 64}, "eval_mask_map_50", 0.5),
)


def main() -> int:
    parser = argparse.ArgumentParser(
        description="Train a segmenter and two detectors on composed photographs, and use them.",
        epilog="Other flags go to scripts/train_dense.py.",
        allow_abbrev=False,
    )
    parser.add_argument("--data_dir", type=Path, default=Path("outputs/demo-dense-data"), help="where the data go")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/demo-dense"), help="where the models go")
    parser.add_argument("--stamps", type=Path, help="where Tux Paint's stamps are, unless where Debian has them")
    parser.add_argument("--images", type=int, default=2000, help="training images of each data set")
    parser.add_argument("--any_result", action="store_true", help="do not fail when a result is low")
    arguments, train_flags = parser.parse_known_args()

    started = time.perf_counter()
    heading(1, f"the data, as Parquet shards in {arguments.data_dir}")
    build = [sys.executable, str(ROOT / "examples/tuxpaint_stamps.py"), str(arguments.data_dir)]
    build += [
        "--categories",
        *CATEGORIES,
        "--train",
        str(arguments.images),
        "--validation",
        str(max(arguments.images // 10, 1)),
    ]
    run(build + (["--stamps", str(arguments.stamps)] if arguments.stamps else []))

    # Everything accelerate would otherwise take from a configuration file of the user's, and warn about; and threads
    # on all cores, where its own choice is one thread.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes=1", "--num_machines=1"]
    launch += ["--mixed_precision=no", "--dynamo_backend=no", f"--num_cpu_threads_per_process={cores()}"]
    results, before = {}, None
    for number, (task, data, heads, _, _) in enumerate(STAGES, start=2):
        heading(number, f"{task}: training on a stream of it")
        command = [*launch, str(ROOT / "scripts/train_dense.py"), "--task", task, "--recipe", "demo"]
        command += ["--dataset_name", str(arguments.data_dir / data), "--output_dir", str(arguments.output_dir / task)]
        command += ["--overwrite_output_dir"]
        if before is not None:
            command += ["--model_name_or_path", str(before), "--config_overrides", json.dumps(heads)]
        run([*command, *train_flags])
        before = arguments.output_dir / task
        results[task] = json.loads((before / "all_results.json").read_text())

    heading(5, "using them: pipeline(...)")
    show(arguments.data_dir, arguments.output_dir)

    heading(6, f"done in {time.perf_counter() - started:.0f} s")
    low = []
    for task, _, _, key, wanted in STAGES:
        value = results[task][key] or 0.0
        figure = f"{key.removeprefix('eval_'):12} {value:.3f} (wanted: {wanted})"
        print(f"{task:22}  {figure}  {arguments.output_dir / task}")
        if value < wanted:
            low.append(task)
    print("in each folder: model, card (README.md), curves.png, predictions.png, all_results.json")
    if low and not arguments.any_result:
        print(f"error: {', '.join(low)} stayed below what was wanted", file=sys.stderr)
        return 1
    return 0


def show(data_dir: Path, output_dir: Path) -> None:
    """The pipelines on the first images of the validation splits."""
    for task, data, *_ in STAGES:
        files = str(data_dir / data / "validation-*.parquet")
        row = next(iter(datasets.load_dataset("parquet", data_files=files, split="train", streaming=True)))
        name = "object-detection" if task == "object-detection" else "image-segmentation"
        found = pipeline(name, model=str(output_dir / task), device="cpu")(row["image"], threshold=0.4)
        parts = [
            part["label"]
            + (f" {part['score']:.2f}" if part["score"] is not None else "")
            + (f" at {list(part['box'].values())}" if "box" in part else "")
            for part in found
        ]
        print(f"{task:22}  {'; '.join(parts) or 'nothing'}")


def heading(number: int, text: str) -> None:
    print(f"\n[{number}/6] {text}", flush=True)


def cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


if __name__ == "__main__":
    start(main)
