"""`hf-poolformer predict`: label images, or compute their features.

    hf-poolformer predict MODEL photos --output predictions.csv
    accelerate launch -m hf_poolformer predict MODEL --dataset_name USER/DATASET --output outputs/labels

Takes files, folders, datasets, streams of any length. An --output that ends in .parquet, .csv or .jsonl is one table.
Any other is a folder of Parquet parts, which several processes fill together; killed or stopped, the same command goes
on where it was.
"""

from __future__ import annotations

import dataclasses
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..foundation.strict_json import to_json
from . import CommandParser, add_model_arguments, command, quieten


PART_SIZE = 10_000  # that of prediction.run, whose import takes seconds
# Of an argument that `benchmark predict` has as well.
DEVICE_PREPROCESSING: dict[str, Any] = {
    "choices": ["auto", "no", "decode"],
    "default": "no",
    "help": "decode: a CUDA GPU decodes and resizes the JPEGs, too; auto: if that is faster (default: %(default)s)",
}


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier")
    add("inputs", metavar="INPUT", nargs="*", help="image files, folders, globs, Parquet files, WebDataset tars")
    add("--output", required=True, help="a table (.parquet, .csv, .jsonl) or a folder of Parquet parts")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    add("--top_k", type=int, help="the best so many classes of an image (default: 5; of several labels, those it has)")
    add("--threshold", type=float, help="probability from which an image has a label (default: the model's own)")
    add("--embeddings", action="store_true", help="also write the features that the head classifies")
    add("--part_size", type=int, default=PART_SIZE, help="rows of a part in a folder (default: %(default)s)")
    add("--num_workers", type=int, help="processes that decode (default: by cores)")
    add("--device_preprocessing", **DEVICE_PREPROCESSING)
    add("--dataset_name", help="Hub dataset to predict")
    add("--dataset_config_name", help="its configuration")
    add("--split", help="its split")
    add("--image_column_name", help="column of the images, where a dataset has several")
    add("--json", action="store_true", help="print the summary as JSON, for programs")
    add_model_arguments(parser, batch_size=32)
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Predicts. Exit status 1 if no image at all could be read."""
    arguments = parser(prog).parse_args(argv)
    options = vars(arguments)
    as_json = options.pop("json")
    terminated = []

    def terminate(number: int, frame: object) -> None:
        # Noted, not raised: an exception in the middle of a fork may leave a lock behind. A second one ends it all.
        terminated.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, terminate)
    try:
        from ..prediction import predict

        quieten()
        if "MASTER_ADDR" in os.environ:  # accelerate launch was asked for several processes
            from ..foundation.processes import start_cpu_processes

            start_cpu_processes()
        summary = predict(**options, should_stop=lambda: terminated)
    except KeyboardInterrupt:
        kept = "was not written" if Path(arguments.output).suffix else "is not complete; the same command goes on"
        print(f"stopped: {arguments.output} {kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    for example in summary.examples:
        print(f"broken: {example}", file=sys.stderr)
    # Of several processes, the one that came last speaks for all.
    if summary.complete or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        print(to_json(dataclasses.asdict(summary), indent=2, default=str) if as_json else summary)
    return 0 if summary.predicted or not summary.broken else 1
