"""Trains an image classifier: `accelerate launch scripts/train.py --dataset_name ... --output_dir ...`."""

import sys
from pathlib import Path


# Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hf_poolformer.commands.train import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main())
