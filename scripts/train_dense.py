"""Trains a segmenter or detector: `accelerate launch scripts/train_dense.py --task TASK --dataset_name ...`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
