"""`hf-poolformer export`: write ONNX, OpenVINO and other files, or a web page, and compare them with the model.

    hf-poolformer export outputs/pets outputs/pets-onnx
    hf-poolformer export outputs/pets outputs/pets-bf16 --format openvino --precision bfloat16
    hf-poolformer export outputs/pets outputs/pets-int8 --format openvino --precision int8 --calibration_dataset photos
    hf-poolformer export outputs/pets outputs/pets-page --format web --vendor

Takes image classifiers, semantic segmenters and detectors (for ONNX and OpenVINO) of every family. The graph has
everything computed beforehand that does not depend on the image. The same images go through it and through the model;
the folder appears when both agree, with labels, processor settings, versions and a card in it. `predict` and
`evaluate` take it like any model.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from ..export.format import PRECISIONS
from ..export.formats import FORMATS, formats_with
from ..export.onnx import DEFAULT_OPSET, OPSETS
from ..export.torch import DEVICES
from ..foundation.strict_json import to_json
from . import CommandParser, add_model_arguments, command, quieten


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier, a segmenter or a detector")
    add("output", metavar="OUT", type=Path, help="folder to write")
    runtimes = ", ".join(f"{name} for {format.runtime}" for name, format in FORMATS.items())
    add("--format", choices=list(FORMATS), default="onnx", help=f"{runtimes} (default: %(default)s)")
    add(
        "--precision",
        choices=PRECISIONS,
        help=f"bfloat16 is for {formats_with('bfloat16')}, int8 for {formats_with('int8')} (default: float32; of web "
        "int8 with a calibration dataset, else float16)",
    )
    add("--overwrite", action="store_true", help="replace the export that lies at OUT")
    add(
        "--preprocessing",
        action="store_true",
        help="take uint8 (batch, height, width, channels), resized and cropped, and give probabilities; of segmenters "
        "and detectors: take photographs of any size, and answer in their pixels",
    )
    add(
        "--dynamic_size",
        choices=["true", "false"],
        help="take images of other sizes, too (default: where the family allows it; of classifiers for phones false)",
    )
    add("--opset", type=int, help=f"of onnx, {OPSETS.start} to {OPSETS.stop - 1} (default: {DEFAULT_OPSET})")
    add("--compile", action="store_true", help="of torch: machine code for machines like this one (AOTInductor)")
    add("--device", choices=DEVICES, help="of torch: what is to compute it (default: cpu)")
    add(
        "--vendor",
        nargs="?",
        const=True,
        metavar="FOLDER",
        help="of web: put onnxruntime-web beside the page, fetched by npm, or out of its unpacked npm package",
    )
    add(
        "--calibration_dataset",
        metavar="DATASET",
        help="images to calibrate int8 on, and to compare on: folder, Parquet files or Hub id; streamed",
    )
    add("--calibration_config_name", help="its configuration")
    add("--calibration_split", help="its split")
    add("--image_column_name", help="column of the images, where the dataset has several")
    add("--calibration_size", type=int, default=300, help="images to calibrate on (default: %(default)s)")
    add("--verification_size", type=int, default=200, help="other images to compare on (default: %(default)s)")
    add("--json", action="store_true", help="print the summary as JSON, for programs")
    add_model_arguments(parser, device=False, dtype=False)
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Exports, and says how the result compares with the model."""
    options = vars(parser(prog).parse_args(argv))
    as_json = options.pop("json")
    dynamic = options.pop("dynamic_size")
    from tqdm import tqdm

    from ..export import export_model

    quieten()
    with tqdm(desc="exporting", bar_format="{desc} [{elapsed}]", leave=False) as bar:
        summary = export_model(
            **options, dynamic_size=None if dynamic is None else dynamic == "true", progress=bar.set_description_str
        )
    print(to_json(dataclasses.asdict(summary), indent=2, default=str) if as_json else summary)
    return 0
