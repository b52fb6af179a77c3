"""`python -m hf_poolformer.hub MODEL_DIR --repo_id ...` publishes, as scripts/publish.py does."""

import sys

from ..commands.publish import main


if __name__ == "__main__":
    sys.exit(main(prog="python -m hf_poolformer.hub"))
