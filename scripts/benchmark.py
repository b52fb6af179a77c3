"""Times PoolFormer next to its peers: `python scripts/benchmark.py [infer | train | latency | process | growth]`."""

from hf_poolformer_cli import run_script


if __name__ == "__main__":
    run_script(__file__)
