"""Converts a published checkpoint, or back: `python scripts/convert.py poolformer_s12.pth.tar converted/s12`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
