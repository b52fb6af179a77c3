"""`hf-poolformer convert`: turn a published checkpoint into a folder of this package, or back.

    hf-poolformer convert poolformer_s12.pth.tar converted/poolformer_s12
    hf-poolformer convert timm/caformer_s18.sail_in1k converted/caformer_s18
    hf-poolformer convert converted/caformer_s18 back --to official

Reads official `.pth` and `.pth.tar` files (classifiers; RetinaNet and Mask R-CNN of mmdetection, Semantic FPN of
mmsegmentation, and the backbone of their other methods), files and folders of timm and transformers, and Hub ids of
either.
"""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from . import CommandParser, UserError, command, quieten


TARGETS = ("hf", "official", "timm")  # those of conversion.convert, whose import takes seconds


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    add = parser.add_argument
    add("checkpoint", metavar="CHECKPOINT", help="file, folder or Hub id")
    add("out_dir", metavar="OUT_DIR", type=Path, help="folder to write; appears complete or not at all")
    add("--variant", help="which variant or family it is, where weights leave a choice")
    add("--labels", type=Path, help="class names: one a line, or a JSON list, or a JSON id-to-name map")
    add("--to", choices=TARGETS, default="hf", help="what to write (default: %(default)s)")
    add("--weights", metavar="NAME", help="which set of weights of a file with several, such as state_dict")
    add("--overwrite", action="store_true", help="replace the folder of an earlier conversion")
    add(
        "--set",
        metavar="FIELD=VALUE",
        action="append",
        default=[],
        help="a field of the configuration that weights do not tell, such as pool_size=5; VALUE is JSON or a word",
    )
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Converts, and says what became of it."""
    arguments = parser(prog).parse_args(argv)
    labels = read_labels(arguments.labels) if arguments.labels else None
    overrides = read_fields(arguments.set)
    from ..conversion.convert import convert
    from ..hub.cards import folder_card

    # A plain installation converts as well; publishing writes the card that is missing then.
    card = folder_card if importlib.util.find_spec("jinja2") else None

    quieten()
    checkpoint = convert(
        arguments.checkpoint,
        arguments.out_dir,
        variant=arguments.variant,
        labels=labels,
        to=arguments.to,
        overwrite=arguments.overwrite,
        overrides=overrides,
        weights=arguments.weights,
        card=card,
    )
    for note in checkpoint.notes:
        # Keys come from the file, which may put anything into them.
        print("note:", "".join(c if c.isprintable() else " " for c in note))
    if card is None and arguments.to == "hf":
        print("note: there is no README.md, a card needs jinja2: pip install 'hf-poolformer[train]'")
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
        raise UserError(f"cannot read labels from {path}: {type(error).__name__} {error}") from error
    labels = [str(label).strip() for label in content]
    if not all(labels):
        raise UserError(f"{path}: label {labels.index('') + 1} is empty")
    return labels


def read_fields(assignments: Sequence[str]) -> dict[str, Any]:
    fields = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals:
            raise UserError(f"--set {assignment}: write it as FIELD=VALUE")
        try:
            fields[name] = json.loads(value)
        except ValueError:
            fields[name] = value
    return fields
