"""Trains a segmenter or detector: `accelerate launch scripts/train_dense.py --task TASK --dataset_name ...`.

Semantic FPN (`semantic-segmentation`), RetinaNet (`object-detection`) or Mask R-CNN (`instance-segmentation`) on a
PoolFormer or MetaFormer, by the paper's recipes unless told otherwise.
"""

import logging
import sys
from pathlib import Path


# Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hf_poolformer.hub.publishing import PublishError  # noqa: E402
from hf_poolformer.training.dense.arguments import parse  # noqa: E402
from hf_poolformer.training.dense.loop import train  # noqa: E402
from hf_poolformer.training.errors import UserError  # noqa: E402
from hf_poolformer.training.processes import start_cpu_processes  # noqa: E402


def main() -> int:
    logging.basicConfig(format="%(message)s")
    try:
        start_cpu_processes()
        train(parse())
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except PublishError as error:
        print(f"error: {error}", file=sys.stderr)
        return 3
    except KeyboardInterrupt:
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
