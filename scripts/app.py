"""A page to try models on, in the browser: `python scripts/app.py outputs/mine`."""

import sys
from pathlib import Path


# Python looks for modules beside the script first, where evaluate.py would hide the library of that name.
sys.path[:] = [path for path in sys.path if Path(path or ".").resolve() != Path(__file__).resolve().parent]

from hf_poolformer.commands.app import main  # noqa: E402


if __name__ == "__main__":
    sys.exit(main())
