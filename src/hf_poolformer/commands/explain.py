"""`hf-poolformer explain`: where in an image a classifier finds its classes.

    hf-poolformer explain MODEL photo.jpg --output explanation.png
    hf-poolformer explain MODEL photo.jpg --classes cat dog --method cam

Draws the image beside a heat map for each class: Grad-CAM, for every family and stage, or the class activation map,
exact where the head is linear. What lies outside of the model's centre crop is darkened.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..foundation.errors import UserError
from ..foundation.origin import Origin
from ..foundation.strict_json import to_json
from . import CommandParser, add_model_arguments, command, quieten


if TYPE_CHECKING:
    from ..explanation.explainer import Explanation

METHODS = {"gradcam": "Grad-CAM", "cam": "Class activation map"}
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".pdf", ".svg")


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("model", metavar="MODEL", help="folder or Hub id of an image classifier of this package's families")
    add("image", metavar="IMAGE", type=Path, help="image file")
    add(
        "--output",
        type=Path,
        metavar="FILE",
        help=f"the picture: {', '.join(SUFFIXES)} (default: IMAGE-explained.png)",
    )
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--classes", nargs="+", metavar="CLASS", help="names or numbers of classes to explain")
    which.add_argument("--top_k", type=int, default=3, help="explain the best classes (default: %(default)s)")
    add("--method", choices=METHODS, default="gradcam", help="default: %(default)s")
    add(
        "--stage",
        type=int,
        help="stage to look at, counted from 1: earlier ones are finer and tell less about the class (default: the "
        "last; the last of at least 4 x 4 positions where images are small)",
    )
    add("--json", action="store_true", help="print classes, scores and places as JSON, for programs")
    add_model_arguments(parser)
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    arguments = parser(prog).parse_args(argv)
    output = arguments.output or Path(f"{arguments.image.stem}-explained.png")
    check(arguments.image, output, arguments.top_k, arguments.stage)
    from ..data.decoding import BrokenImage, decode_image
    from ..data.transforms import channels_of
    from ..explanation.explainer import explain
    from ..explanation.pictures import write_explanation
    from ..foundation.exported import is_exported, no_model
    from ..prediction.inference import Predictor

    quieten()
    if is_exported(arguments.model):
        raise UserError(no_model(arguments.model))
    origin = Origin(arguments.revision, arguments.token, arguments.cache_dir, arguments.trust_remote_code)
    predictor = Predictor(arguments.model, device=arguments.device, dtype=arguments.dtype, origin=origin)
    try:
        image = decode_image(arguments.image, num_channels=channels_of(predictor.processor))
    except BrokenImage as error:
        raise UserError(f"{arguments.image}: {error}") from error
    stages = len(getattr(predictor.model.config, "depths", ()))
    if stages and arguments.stage is not None and arguments.stage > stages:
        raise UserError(f"there is no stage {arguments.stage}: the model has {stages}, numbered from 1")
    explanation = explain(
        predictor,
        image,
        arguments.classes,
        top_k=arguments.top_k,
        method=arguments.method,
        stage=None if arguments.stage is None else arguments.stage - 1,
    )
    stage = explanation.stage + 1
    caption = f"{METHODS[arguments.method]}, stage {stage} of {stages}"
    write_explanation(output, explanation, title=arguments.image.name, caption=caption)
    if arguments.json:
        print(to_json(summary(explanation, arguments, output), indent=2, ensure_ascii=False))
        return 0
    width = max(len(found.label) for found in explanation.classes)
    for found in explanation.classes:
        print(f"{found.label:<{width}}  {found.score_text:>6}")
    print(f"{caption}: {output}")
    return 0


def check(image: Path, output: Path, top_k: int, stage: int | None) -> None:
    """What can be known before torch is imported."""
    if output.suffix.lower() not in SUFFIXES:
        raise UserError(f"--output {output} is no picture; give it one of the endings {', '.join(SUFFIXES)}")
    if not image.exists():
        raise UserError(f"{image}: no such file")
    if output.exists() and output.samefile(image):
        raise UserError(f"--output {output} is the image itself")
    if top_k < 1:
        raise UserError("--top_k must be at least 1")
    if stage is not None and stage < 1:
        raise UserError("--stage counts from 1")


def summary(explanation: Explanation, arguments: argparse.Namespace, output: Path) -> dict[str, Any]:
    """For programs: places in pixels of the image as it is stored, upright."""
    width, height = explanation.size
    return {
        "model": arguments.model,
        "image": str(arguments.image),
        "size": [width, height],
        "seen": [round(value, 1) for value in explanation.seen],
        "method": arguments.method,
        "stage": explanation.stage + 1,
        "classes": [
            {
                "label": found.label,
                "index": found.index,
                "score": found.score,
                "logit": found.logit,
                "peak": None if found.peak is None else [round(found.peak[0] * width), round(found.peak[1] * height)],
            }
            for found in explanation.classes
        ],
        "output": str(output),
    }
