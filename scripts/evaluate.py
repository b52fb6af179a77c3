"""Evaluates an image classifier: `accelerate launch scripts/evaluate.py MODEL --dataset_name ...`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
