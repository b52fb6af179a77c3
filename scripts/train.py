"""Trains an image classifier: `accelerate launch scripts/train.py --dataset_name ... --output_dir ...`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
