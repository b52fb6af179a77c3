"""Renders the cards of the published checkpoints: `python scripts/make_cards.py`, or `make cards`."""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from hf_poolformer import VARIANTS
from hf_poolformer.hub.metadata import CardError
from hf_poolformer.hub.published_cards import published_card


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", metavar="NAME", help="variants, like poolformer_s12 (default: all)")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cards"), help="(default: %(default)s)")
    parser.add_argument("--repo_id", metavar="USER/NAME", help="where the one checkpoint is published")
    arguments = parser.parse_args(argv)
    names = arguments.names or list(VARIANTS)
    if arguments.repo_id and len(names) != 1:
        parser.error("--repo_id needs exactly one NAME")
    faults = []
    for name in names:
        try:
            card = published_card(name, repo_id=arguments.repo_id)
        except CardError as error:
            faults.append(str(error))
            continue
        path = arguments.output_dir / name / "README.md"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(card, encoding="utf-8", newline="\n")
    for fault in faults:
        print(f"error: {fault}", file=sys.stderr)
    print(f"{len(names) - len(faults)} of {len(names)} cards in {arguments.output_dir}")
    return 2 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
