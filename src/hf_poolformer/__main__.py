"""`python -m hf_poolformer` is `hf-poolformer`, also for `accelerate launch -m hf_poolformer train ...`."""

import sys

from hf_poolformer_cli import main


if __name__ == "__main__":
    sys.exit(main())
