"""Label images, or compute their features: files, folders, datasets, streams of any length.

    python scripts/predict.py MODEL photos --output predictions.csv
    accelerate launch scripts/predict.py MODEL --dataset_name USER/DATASET --output outputs/labels

An --output that ends in .parquet, .csv or .jsonl is one table. Any other is a folder of Parquet parts, which several
processes fill together; killed or stopped, the same command goes on where it was.
"""

import argparse
import os
import signal
import sys
from pathlib import Path


# Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hf_poolformer.prediction import predict  # noqa: E402
from hf_poolformer.prediction.run import PART_SIZE  # noqa: E402
from hf_poolformer.training.errors import UserError  # noqa: E402


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier")
    add("inputs", metavar="INPUT", nargs="*", help="image files, folders, globs, Parquet files, WebDataset tars")
    add("--output", required=True, help="a table (.parquet, .csv, .jsonl) or a folder of Parquet parts")
    add("--overwrite", action="store_true", help="replace the output if it exists")
    add("--top_k", type=int, default=5, help="classes per image (default: %(default)s)")
    add("--embeddings", action="store_true", help="also write the features that the head classifies")
    add("--batch_size", type=int, default=32, help="images at once (default: %(default)s)")
    add("--part_size", type=int, default=PART_SIZE, help="rows of a part in a folder (default: %(default)s)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ... (default: an accelerator if there is one)")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="default: %(default)s")
    add("--num_workers", type=int, help="processes that decode (default: by cores)")
    add("--dataset_name", help="Hub dataset to predict")
    add("--dataset_config_name", help="its configuration")
    add("--split", help="its split")
    add("--image_column_name", help="column of the images, where a dataset has several")
    add("--revision", default="main", help="revision of the model")
    add("--token", help="Hub token (default: the one of `hf auth login`)")
    add("--cache_dir", help="where downloads are kept")
    add("--trust_remote_code", action="store_true", help="run code that comes with the model")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    terminated = []

    def terminate(number: int, frame: object) -> None:
        # Noted, not raised: an exception in the middle of a fork may leave a lock behind. A second one ends it all.
        terminated.append(number)
        signal.signal(number, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, terminate)
    try:
        if "MASTER_ADDR" in os.environ:  # accelerate launch was asked for several processes
            from hf_poolformer.training.processes import start_cpu_processes

            start_cpu_processes()
        summary = predict(**vars(arguments), should_stop=lambda: terminated)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "was not written" if Path(arguments.output).suffix else "is not complete; the same command goes on"
        print(f"stopped: {arguments.output} {kept}", file=sys.stderr)
        return 128 + (signal.SIGTERM if terminated else signal.SIGINT)
    for example in summary.examples:
        print(f"broken: {example}", file=sys.stderr)
    # Of several processes, the one that came last speaks for all.
    if summary.complete or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        print(summary)
    return 0 if summary.predicted or not summary.broken else 1


if __name__ == "__main__":
    sys.exit(main())
