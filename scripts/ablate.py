"""Reruns the paper's ablation table: `accelerate launch scripts/ablate.py --rows all --dataset_name ...`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
