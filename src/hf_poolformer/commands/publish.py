"""`hf-poolformer publish`: a model's or a dataset's folder to the Hub, in one commit, verified.

hf-poolformer publish outputs/pets --repo_id me/pets
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

from ..foundation.files import size_text
from ..foundation.strict_json import to_json
from . import CommandParser, command, complain


REPO_TYPES = ("model", "dataset", "kernel")  # those of hub.publishing, whose import takes a moment


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(
        prog=prog,
        description=(
            "Publish the folder of a trained model, or of a dataset, on the Hugging Face Hub: one commit with "
            "weights, configuration, code, processor, card, figures and the log of the training, downloaded again "
            "and compared. Interrupted, the same command goes on."
        ),
        epilog="The token is the one `hf auth login` or HF_TOKEN left; it is written nowhere.",
        formatter_class=argparse.HelpFormatter,
    )
    add = parser.add_argument
    add("folder", metavar="MODEL_DIR", type=Path, help="the folder; but for kernels it is only read")
    add("--repo_id", required=True, metavar="USER/NAME", help="where to; created if need be")
    add(
        "--repo_type",
        choices=REPO_TYPES,
        default="model",
        help="kernel: this package's kernels are written into the folder first (default: %(default)s)",
    )
    add("--private", action="store_true", default=None, help="only you can see the repository")
    add("--gated", choices=("auto", "manual"), help="people ask for access: everybody gets it, or you grant it")
    add("--revision", metavar="BRANCH", help="branch to commit to; created if need be (default: main)")
    add("--create_pr", action="store_true", help="propose the commit as a pull request")
    add("--commit_message", metavar="TEXT", help="first line of the commit")
    add("--exclude", nargs="+", default=(), metavar="PATTERN", help="files that stay behind, like 'predictions*'")
    add("--license", metavar="ID", help="licence, for the card of a folder that has none")
    add(
        "--max_shard_size",
        default="5GB",
        metavar="SIZE",
        help="weights above this go up in several files (default: %(default)s)",
    )
    add(
        "--space",
        nargs="?",
        const=True,
        default=False,
        metavar="USER/NAME",
        help="also make a Space, a page to try the model on (default name: the model's); static: the folder is a page "
        "of `export --format web`, and becomes the Space",
    )
    add(
        "--space_package",
        default="wheel",
        metavar="CHOICE",
        help="how the Space gets this package: wheel, it carries the code that runs here; index, from the package "
        "index; the path of a wheel; or an address like git+https://... (default: %(default)s)",
    )
    add("--no_verify", action="store_true", help="do not download and compare what was uploaded")
    add("--dry_run", action="store_true", help="only list what would go up and what would stay; sends nothing")
    add("--json", action="store_true", help="print the outcome as JSON, for programs")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Publishes, and says what went up and where it is."""
    arguments = parser(prog).parse_args(argv)
    options = {name: value for name, value in vars(arguments).items() if name not in ("dry_run", "json", "no_verify")}
    options["verify"] = not arguments.no_verify
    folder, repo_id = options.pop("folder"), options.pop("repo_id")
    from ..hub.publishing import PublishError, publish, publish_command

    try:
        if arguments.dry_run:
            return list_contents(folder, repo_id, arguments)
        published = publish(folder, repo_id, **options)
    except PublishError as error:
        return complain(str(error), argv)
    except KeyboardInterrupt:
        again = publish_command(folder, repo_id, **options)
        print(f"interrupted; {folder} is complete.\nTo go on: {again}", file=sys.stderr)
        raise
    if arguments.json:
        print(to_json(asdict(published), indent=2))
        return 0
    for note in published.notes:
        print(f"note: {note}")
    print(f"{len(published.files)} files, {size_text(published.size)}, commit {published.commit[:8]}")
    print(f"Published: {published.pull_request or published.url}")
    if published.space:
        print(f"To try it: {published.space}")
    return 0


def list_contents(folder: Path, repo_id: str, arguments: argparse.Namespace) -> int:
    """What `--dry_run` prints."""
    from huggingface_hub import get_token

    from ..hub.contents import collect
    from ..hub.kernel_repository import kernel_contents
    from ..hub.publishing import package_of
    from ..hub.spaces import STATIC, page_contents, space_contents

    page = arguments.space == STATIC
    package = package_of(arguments.space, arguments.space_package)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-") as scratch:
        if page:
            contents = page_contents(
                folder, repo_id, exclude=arguments.exclude, license=arguments.license, secret=get_token()
            )
        elif arguments.repo_type == "kernel":
            contents = kernel_contents(folder, repo_id)
        else:
            contents = collect(
                folder,
                repo_id,
                scratch,
                repo_type=arguments.repo_type,
                exclude=arguments.exclude,
                max_shard_size=arguments.max_shard_size,
                license=arguments.license,
                secret=get_token(),
            )
        sizes = {name: contents.size(name) for name in sorted(contents.files)}
        if package is not None:
            files = space_contents(contents, repo_id, package).files
            contents.notes.append(f"a Space would have {', '.join(sorted(files))}")
    if arguments.json:
        print(to_json({"files": sizes, "left_out": contents.left_out, "notes": contents.notes}, indent=2))
        return 0
    print(f"{folder} -> {contents.repo_type} {repo_id}: {len(sizes)} files, {size_text(sum(sizes.values()))}")
    for name, size in sizes.items():
        print(f"{size:>13,}  {name}")
    for name, why in contents.left_out.items():
        print(f"{'stays':>13}  {name} ({why})")
    for note in contents.notes:
        print(f"note: {note}")
    print("Nothing was sent (--dry_run).")
    return 0
