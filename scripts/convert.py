"""Convert a published checkpoint into a folder of this package, or back.

    python scripts/convert.py poolformer_s12.pth.tar converted/poolformer_s12
    python scripts/convert.py timm/caformer_s18.sail_in1k converted/caformer_s18
    python scripts/convert.py converted/caformer_s18 back --to official

Reads official `.pth` and `.pth.tar` files (classifiers; RetinaNet and Mask R-CNN of mmdetection, Semantic FPN of
mmsegmentation, and the backbone of their other methods), files and folders of timm and transformers, and Hub ids of
either. Exits with status 2 and one line on stderr if it cannot.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from transformers.utils import logging

from hf_poolformer.hub.conversion import TARGETS, ConversionError, convert


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="file, folder or Hub id")
    parser.add_argument(
        "out_dir", metavar="OUT_DIR", type=Path, help="folder to write; appears complete or not at all"
    )
    parser.add_argument("--variant", help="which variant or family it is, where weights leave a choice")
    parser.add_argument(
        "--labels", type=Path, help="class names: one a line, or a JSON list, or a JSON id-to-name map"
    )
    parser.add_argument("--to", choices=TARGETS, default="hf", help="what to write (default: %(default)s)")
    parser.add_argument("--overwrite", action="store_true", help="replace the folder of an earlier conversion")
    parser.add_argument(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of the configuration that weights do not tell, such as pool_size=5; VALUE is JSON or a word",
    )
    arguments = parser.parse_args(argv)
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    try:
        checkpoint = convert(
            arguments.checkpoint,
            arguments.out_dir,
            variant=arguments.variant,
            labels=read_labels(arguments.labels) if arguments.labels else None,
            to=arguments.to,
            overwrite=arguments.overwrite,
            overrides=read_fields(arguments.set),
        )
    except ConversionError as error:
        # Keys come from the file, which may put anything into them.
        print("error:", "".join(c if c.isprintable() else " " for c in str(error)), file=sys.stderr)
        return 2
    for note in checkpoint.notes:
        print("note:", "".join(c if c.isprintable() else " " for c in note))
    what = checkpoint.variant or checkpoint.family or "an architecture of its own"
    count = sum(tensor.numel() for tensor in checkpoint.tensors.values())
    print(f"{checkpoint.source}: {checkpoint.format.name} format, {what}, {count} numbers -> {arguments.out_dir}")
    return 0


def read_labels(path: Path) -> list[str]:
    """Class names in order, from a text file with one a line, a JSON list, or a JSON map of index to name."""
    try:
        text = path.read_text(encoding="utf-8")
        content = json.loads(text) if path.suffix == ".json" else text.splitlines()
        if isinstance(content, dict):
            content = [content[str(index)] for index in range(len(content))]
    except (OSError, ValueError, KeyError) as error:
        raise ConversionError(f"cannot read labels from {path}: {type(error).__name__} {error}") from error
    labels = [str(label).strip() for label in content]
    if not all(labels):
        raise ConversionError(f"{path}: label {labels.index('') + 1} is empty")
    return labels


def read_fields(assignments: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise ConversionError(f"--set {assignment}: write it as FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields


if __name__ == "__main__":
    sys.exit(main())
