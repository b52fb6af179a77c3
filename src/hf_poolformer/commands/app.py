"""`hf-poolformer app`: a page to try models on, in the browser.

    hf-poolformer app outputs/pets
    hf-poolformer app outputs/pets sail/poolformer_s12 --examples photos
    hf-poolformer app outputs/pets --report outputs/pets-report

Upload an image or take one with the webcam: a classifier shows its best classes and where it sees them, a segmenter or
detector what is where. Only this machine reaches the page, and only the models named here can be used, unless a flag
says otherwise.
"""

from __future__ import annotations

import re
import threading
from collections.abc import Sequence
from pathlib import Path

from ..foundation.errors import UserError
from . import CommandParser, add_model_arguments, command, quieten


MEGAPIXELS = 40
FILE_SIZE = "20mb"


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("models", metavar="MODEL", nargs="+", help="folders or Hub ids of classifiers, segmenters, detectors")
    add("--examples", nargs="+", type=Path, metavar="PLACE", help="images to click on, or folders of them")
    add("--report", type=Path, metavar="FOLDER", help="what evaluate, compare or inspect wrote, as a second tab")
    add(
        "--host",
        default="127.0.0.1",
        help="address to listen on; 0.0.0.0 for the whole network (default: %(default)s)",
    )
    add("--port", type=int, help="default: 7860, or the next one that is free")
    add("--share", action="store_true", help="also through a tunnel of Gradio's, for whoever knows its address")
    add(
        "--allow_any_model",
        action="store_true",
        help="visitors may name any PoolFormer or MetaFormer on the Hub, which is downloaded without your token",
    )
    add("--max_megapixels", type=float, default=MEGAPIXELS, help="of an image (default: %(default)s)")
    add("--max_file_size", default=FILE_SIZE, metavar="SIZE", help="of an image (default: %(default)s)")
    add_model_arguments(parser, dtype=False)
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Serves until it is interrupted."""
    arguments = parser(prog).parse_args(argv)
    if arguments.port is not None and not 0 < arguments.port < 65536:
        raise UserError(f"--port {arguments.port} is no port: 1 to 65535")
    if not re.fullmatch(r"\d+ *[kmg]b", arguments.max_file_size.lower()):
        raise UserError(f"--max_file_size {arguments.max_file_size} is not a size; write it like 20mb")
    if not arguments.max_megapixels > 0:
        raise UserError("--max_megapixels must be above 0")
    from ..app.interface import serve

    quieten()
    options = vars(arguments)
    options["max_pixels"] = int(options.pop("max_megapixels") * 1e6)
    models = options.pop("models")
    options["examples"] = options["examples"] or default_examples(models[0])
    page = serve(models, **options)
    try:
        print(f"{', '.join(models)}: {page.local_url} (Ctrl-C ends it)", flush=True)
        if page.share_url:
            print(f"For others: {page.share_url}", flush=True)
        threading.Event().wait()
    finally:
        page.close(verbose=False)


def default_examples(model: str) -> list[Path]:
    """The folder `examples` of a model's folder, if it has one."""
    folder = Path(model) / "examples"
    return [folder] if folder.is_dir() else []
