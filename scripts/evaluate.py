"""Evaluates an image classifier: `accelerate launch scripts/evaluate.py MODEL --dataset_name ...`."""

import logging
import sys
from pathlib import Path


# Python looks for modules beside the script first, where this one would hide the library of the same name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from accelerate import PartialState  # noqa: E402

from hf_poolformer.training.arguments import parse_evaluation  # noqa: E402
from hf_poolformer.training.errors import UserError  # noqa: E402
from hf_poolformer.training.evaluation import evaluate_checkpoint  # noqa: E402
from hf_poolformer.training.processes import start_cpu_processes  # noqa: E402
from hf_poolformer.training.reports import describe  # noqa: E402


def main() -> int:
    logging.basicConfig(format="%(message)s")
    try:
        start_cpu_processes()
        settings = parse_evaluation()
        results = evaluate_checkpoint(settings)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130
    if PartialState().is_main_process:
        print(f"{settings.model}: {describe(results)}.")
        if settings.output_dir:
            print(f"Written to {settings.output_dir}: all_results.json, confusion_matrix.png")
    return 0


if __name__ == "__main__":
    sys.exit(main())
