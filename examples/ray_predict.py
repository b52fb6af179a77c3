"""Labels or features for many images on a Ray cluster, or on this machine's cores.

    pip install 'hf-poolformer[ray]'
    python examples/ray_predict.py MODEL photos --output outputs/labels
    python examples/ray_predict.py MODEL s3://bucket/dataset --format parquet --output s3://bucket/labels \
        --num_actors 16 --num_gpus 1

On a cluster, run it on one of its machines (`ray job submit`); model and images must be readable from all of them.
"""

import argparse
import logging
import sys

import ray

from hf_poolformer.data.files import IMAGE_SUFFIXES
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.ray_data import predict_dataset


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier")
    add("inputs", metavar="INPUT", nargs="+", help="files or folders, here or in an object store")
    add("--output", required=True, help="folder for the Parquet files, here or in an object store")
    add("--format", choices=["images", "parquet"], default="images", help="of the inputs (default: %(default)s)")
    add("--image_column_name", default="image", help="of Parquet files (default: %(default)s)")
    add("--top_k", type=int, help="the best so many classes of an image (default: 5; of several labels, those it has)")
    add("--threshold", type=float, help="probability from which an image has a label (default: the model's own)")
    add("--embeddings", action="store_true", help="also write the features that the head classifies")
    add("--batch_size", type=int, default=32, help="images at once (default: %(default)s)")
    add("--num_actors", type=int, default=1, help="copies of the model (default: %(default)s)")
    add("--num_cpus", type=float, default=1, help="for each of them (default: %(default)s)")
    add("--num_gpus", type=float, default=0, help="for each of them (default: %(default)s)")
    return parser.parse_args()


def main() -> int:
    arguments = parse()
    ray.init(ignore_reinit_error=True, logging_level=logging.WARNING)
    if arguments.format == "parquet":
        column = arguments.image_column_name
        images = ray.data.read_parquet(arguments.inputs, columns=[column])
    else:
        column = "bytes"
        suffixes = sorted(suffix.removeprefix(".") for suffix in IMAGE_SUFFIXES)
        images = ray.data.read_binary_files(arguments.inputs, include_paths=True, file_extensions=suffixes)
    settings = {name: getattr(arguments, name) for name in ("top_k", "threshold", "embeddings", "batch_size")}
    resources = {name: getattr(arguments, name) for name in ("num_actors", "num_cpus", "num_gpus")}
    try:
        predictions = predict_dataset(images, arguments.model, image_column=column, **settings, **resources)
        predictions.write_parquet(arguments.output)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    print(f"Written to {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
