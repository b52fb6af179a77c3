"""`hf-poolformer ablate`: rerun the paper's ablation table on any dataset, under one budget.

    hf-poolformer ablate --rows all --dataset_name outputs/demo-data --output_dir outputs/ablation \\
        --recipe demo --num_train_epochs 8
    accelerate launch -m hf_poolformer ablate --rows "token mixer" --seeds 3 --recipe paper --dataset_name ... \\
        --output_dir ...

Every flag of `hf-poolformer train` sets the budget, the same for all rows. Rows that are done with the same settings,
data and version are not trained again, and the table has all of them, whichever --rows names.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import CommandParser, UserError, command


if TYPE_CHECKING:
    from ..settings.classification import ClassificationSettings


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    parser.add_argument("--rows", nargs="+", default=["all"], metavar="ROW", help="all, groups or rows (default: all)")
    parser.add_argument("--seeds", type=int, default=1, help="runs per row (default: %(default)s)")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Trains every row and writes the table."""
    arguments, training_flags = parser(prog).parse_known_args(argv)
    if arguments.seeds < 1:
        raise UserError(f"--seeds must be at least 1, not {arguments.seeds}")
    from accelerate import PartialState

    from ..foundation.processes import owned, part, start_cpu_processes
    from ..foundation.tasks import CLASSIFICATION
    from ..settings.command_line import parse
    from ..training import ablation

    logging.basicConfig(format="%(message)s")
    names = ablation.choose_rows(arguments.rows)
    base = parse(training_flags, tasks=[CLASSIFICATION], others=list(vars(arguments)))
    start_cpu_processes()
    folder = Path(base.output_dir)
    with owned(folder):
        content = ablation.content_of(base)
        for index, name in enumerate(names):
            for seed in range(base.seed, base.seed + arguments.seeds):
                PartialState().print(f"\n[{index + 1}/{len(names)}] {name}, seed {seed}", flush=True)
                ablation.measure(name, base, folder / "rows" / name / f"seed-{seed}", seed, content)
        if PartialState().is_main_process:
            write_report(base, folder, content)
    part()
    return 0


def write_report(base: ClassificationSettings, folder: Path, content: dict[str, str]) -> None:
    """The table of all that is measured, whichever rows this call was about."""
    from ..foundation.files import best_effort
    from ..foundation.names import printable
    from ..training import ablation

    lines = ablation.summarise(ablation.all_results(base, folder, content))
    number, unit = (base.max_train_steps, "step") if base.max_train_steps else (base.num_train_epochs, "epoch")
    epochs = f"{number} {unit}" if number == 1 else f"{number} {unit}s"
    data = printable(base.dataset_name or base.train_dir)
    about = f"{data}, recipe {base.recipe}, {epochs}, learning rate {base.learning_rate}"
    ablation.write_table(lines, folder, about)
    with best_effort("drawing the table"):
        ablation.draw_table(lines, folder / "ablation.png", about)
    print(f"\n{(folder / 'ablation.md').read_text(encoding='utf-8')}")
    print(f"Table: {folder / 'ablation.md'}, {folder / 'ablation.csv'}; plot: {folder / 'ablation.png'}")
