"""`hf-poolformer table`: rebuild the papers' comparison tables from running models.

Parameters and multiply-accumulates are counted on the models of this package, timm and transformers, and stand beside
the published ones; accuracies are published facts with their sources. Nothing is downloaded, and nothing is trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from ..foundation.errors import UserError
from . import CommandParser, command


EPILOGUE = """\
tables: classification, object-detection, instance-segmentation and segmentation of arXiv 2111.11418, metaformer of
arXiv 2210.13452.

hf-poolformer table --output_dir outputs/papers
hf-poolformer table --tables segmentation object-detection --output_dir outputs/papers
hf-poolformer table --tables classification --measure --device cuda --dtype bfloat16 --output_dir outputs/papers
"""
BATCH_SIZES = {"cpu": 4, "cuda": 128}


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2], epilog=EPILOGUE)
    add = parser.add_argument
    add("--output_dir", type=Path, default=Path("outputs/papers"), help="papers.md and papers/ (default: %(default)s)")
    add("--tables", nargs="+", default=["all"], metavar="TABLE", help="all or some of those below (default: all)")
    add(
        "--measure",
        nargs="*",
        metavar="TABLE",
        help="time these tables' models, and take their memory: classification (what it means alone), metaformer",
    )
    add("--device", choices=["cpu", "cuda"], help="to measure on; default: a GPU if there is one")
    add("--dtype", choices=["float32", "bfloat16", "float16"], default="float32", help="(default: %(default)s)")
    add("--batch_size", type=int, help="images at once (default: 4 on a CPU, 128 on a GPU)")
    add("--rounds", type=int, default=3, help="turns of each model (default: %(default)s)")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Counts, measures if asked to, and writes the page, CSV files and charts."""
    arguments = parser(prog).parse_args(argv)
    for name in ("batch_size", "rounds"):
        value = getattr(arguments, name)
        if value is not None and value < 1:
            raise UserError(f"--{name} must be at least 1, not {value}.")
    import time

    import torch

    from ..benchmark import papers, papers_page
    from ..foundation.settings import check_names

    names = papers.choose_tables(arguments.tables)
    measured = arguments.measure
    if measured is not None:
        measured = measured or ["classification"]
        check_names(measured, papers.CLASSIFIERS, "table to measure")
        if missing := [name for name in measured if name not in names]:
            raise UserError(f"--measure {missing[0]} is not among the --tables {' '.join(names)}.")
    device = arguments.device or ("cuda" if torch.cuda.is_available() else "cpu")
    if device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device cuda: PyTorch sees no GPU here.")
    import timm  # noqa: F401  # without it there are no peers; better said before the counting than in its middle

    tables = [papers.count_table(name) for name in names]
    found = {}
    if measured:
        started, batch_size = time.time(), arguments.batch_size or BATCH_SIZES[device]
        papers.measure(
            [made for made in tables if made.name in measured],
            device=device,
            dtype=arguments.dtype,
            batch_size=batch_size,
            rounds=arguments.rounds,
        )
        found = dict.fromkeys(measured, papers.conditions(device, arguments.dtype, batch_size, started))
    page, *others = papers_page.write(tables, arguments.output_dir, found)
    for made in tables:
        marks = sum(papers.is_marked(row) for row in made.rows)
        print(f"{made.name}: {len(made.rows)} models, {marks} of them differ from what was published by more than 1 %")
    print(f"Page: {page}; CSV files and charts: {others[0].parent}")
    return 0
