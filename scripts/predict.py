"""Labels images, or computes their features: `python scripts/predict.py MODEL photos --output predictions.csv`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
