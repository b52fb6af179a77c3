"""Rerun the paper's ablation table on any dataset, under one budget.

    accelerate launch scripts/ablate.py --rows all --dataset_name outputs/demo-data --output_dir outputs/ablation \\
        --recipe demo --num_train_epochs 8
    accelerate launch scripts/ablate.py --rows "token mixer" --seeds 3 --recipe paper --dataset_name imagenet-1k ...

Every flag of scripts/train.py sets the budget, the same for all rows. Rows that are done are not trained again.
"""

import argparse
import logging
import sys
from pathlib import Path


# Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from accelerate import PartialState  # noqa: E402

from hf_poolformer.training import ablation  # noqa: E402
from hf_poolformer.training.arguments import parse  # noqa: E402
from hf_poolformer.training.errors import UserError  # noqa: E402
from hf_poolformer.training.processes import start_cpu_processes  # noqa: E402


def main() -> int:
    logging.basicConfig(format="%(message)s")
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rows", nargs="+", default=["all"], help=f"all, groups or rows: {', '.join(ablation.ROWS)}")
    parser.add_argument("--seeds", type=int, default=1, help="runs per row (default: 1)")
    arguments, training_flags = parser.parse_known_args()
    try:
        start_cpu_processes()
        names = ablation.choose_rows(arguments.rows)
        if arguments.seeds < 1:
            raise UserError(f"--seeds must be at least 1, not {arguments.seeds}")
        base = parse(training_flags)
        folder = Path(base.output_dir)
        results = []
        for index, name in enumerate(names):
            for seed in range(base.seed, base.seed + arguments.seeds):
                PartialState().print(f"\n[{index + 1}/{len(names)}] {name}, seed {seed}", flush=True)
                results.append(ablation.measure(name, base, folder / "rows" / name / f"seed-{seed}", seed))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if PartialState().is_main_process:
        lines = ablation.summarise(results)
        epochs = f"{base.max_train_steps} steps" if base.max_train_steps else f"{base.num_train_epochs} epochs"
        data = base.dataset_name or base.train_dir
        about = f"{data}, recipe {base.recipe}, {epochs}, {arguments.seeds} seed(s) per row"
        ablation.write_table(lines, folder, about)
        ablation.draw_table(lines, folder / "ablation.png", about)
        print(f"\n{(folder / 'ablation.md').read_text()}")
        print(f"Table: {folder / 'ablation.md'}, {folder / 'ablation.csv'}; plot: {folder / 'ablation.png'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
