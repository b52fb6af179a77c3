"""Publishes a model's or a dataset's folder on the Hub: `python scripts/publish.py outputs/mine --repo_id me/mine`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
