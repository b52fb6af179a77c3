"""Tries settings of a training run: `accelerate launch scripts/sweep.py --search learning_rate=log:1e-4..1e-2 ...`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
