# /// script
# requires-python = ">=3.10"
# dependencies = ["hf-poolformer[train]"]
#
# [tool.hf-jobs]
# flavor = "a10g-small"
# secrets = ["HF_TOKEN"]
# timeout = "6h"
# ///
"""Trains on a GPU of the Hugging Face Hub and publishes the model; the flags are those of `hf-poolformer train`.

    hf jobs uv run examples/hf_job.py --dataset_name ethz/food101 --hub_model_id me/food101

The block above tells uv what to install, and `hf jobs` on what to run. Checkpoints go to a bucket that is mounted at
/runs, if there is one, where a job that is started again finds them: docs/jobs.md.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import HfApi
from huggingface_hub.errors import HfHubHTTPError, LocalTokenNotFoundError

import hf_poolformer_cli


# What outlives a job.
MOUNTED = Path("/runs")


def main(argv: Sequence[str]) -> int:
    """The exit status of the training; 2 before it begins, if the model could not be published at its end."""
    if {"-h", "--help"} & set(argv):
        return hf_poolformer_cli.main(["train", *argv])
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--hub_model_id")
    parser.add_argument("--output_dir", type=Path)
    known, _ = parser.parse_known_args(argv)
    fault = why_not_published(known.hub_model_id)
    if fault is not None:
        print(f"error: {fault}", file=sys.stderr)
        return 2
    root = MOUNTED if MOUNTED.is_dir() else Path("outputs")
    folder = known.output_dir or root / known.hub_model_id.rpartition("/")[2]
    if not folder.is_relative_to(MOUNTED):
        print(f"Checkpoints are in {folder} and end with this machine; a bucket mounted at {MOUNTED} would keep them.")
    # What is said again wins.
    given = ["--output_dir", str(folder), "--push_to_hub", "true", "--resume_from_checkpoint", "latest", *argv]
    return hf_poolformer_cli.main(["train", *given])


def why_not_published(repo_id: str | None) -> str | None:
    """What would keep a trained model from the Hub, as is better known before hours of training; None if nothing."""
    if not repo_id:
        return "name the repository that the model is to be published as: --hub_model_id USER/NAME"
    try:
        user = HfApi().whoami()
    except LocalTokenNotFoundError:
        return "there is no token; give the job yours: hf jobs uv run --secrets HF_TOKEN ..."
    except HfHubHTTPError as error:
        return f"the Hub does not accept the token ({error.response.status_code})"
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        return "the token may only read; make one that may write at https://huggingface.co/settings/tokens"
    return None


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
