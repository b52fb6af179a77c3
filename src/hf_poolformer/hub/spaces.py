"""Spaces of the Hub on which a model can be tried: `hf_poolformer.app` beside the model, or an exported page."""

from __future__ import annotations

import re
from collections.abc import Sequence
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import yaml

from ..foundation.exported import MANIFEST, is_exported
from ..foundation.files import digest, size_text
from .contents import EVERYWHERE_LEFT_OUT, Contents, PublishError, files_in, read_json, refuse_secrets
from .metadata import check_license
from .space_package import WHEELS, SpacePackage


__all__ = ["STATIC", "page_contents", "space_contents"]

# For --space: the folder itself is a page.
STATIC = "static"
# Bytes that the repository of a Space may hold.
MOST_BYTES = 10**9

# The release of Gradio that the app was last looked at with; the Space installs it.
GRADIO_VERSION = "6.31.0"
EMOJI = "🏊"

APP = '''"""The page of this Space; `hf-poolformer publish --space` wrote it."""

{imports}
from hf_poolformer.app.interface import serve


examples = Path(__file__).with_name("examples")
page = serve(["{model}"], examples=[examples] if examples.is_dir() else [], host=None)
page.block_thread()
'''
IMPORTS = "from pathlib import Path\n"
# The wheel is pure Python: unpacked is installed.
CARRIED = """import sys
import tempfile
import zipfile
from pathlib import Path


# requirements.txt cannot name it: a Space installs that file's lines before its other files are there.
site = tempfile.mkdtemp(prefix="hf-poolformer-")
zipfile.ZipFile(Path(__file__).with_name("{wheel}")).extractall(site)
sys.path.insert(0, site)

"""

TEXT = """
Try [{model}](https://huggingface.co/{model}): upload an image, paste it or take one with the webcam.

The page is `hf_poolformer.app`; on your own machine it is `hf-poolformer app {model}`.
"""


def space_contents(model: Contents, repo_id: str, package: SpacePackage) -> Contents:
    """The files of a Space for a model.

    Args:
        model: what is published as the model; its card's licence and its `examples/`, images, go over to the Space.
        repo_id: of the model.
        package: how the Space gets this package.
    """
    front_matter = space_card(
        repo_id,
        sdk="gradio",
        sdk_version=GRADIO_VERSION,
        app_file="app.py",
        pinned=False,
        license=licence(model),
        models=[repo_id],
        short_description=f"Try {repo_id.split('/')[-1]} in the browser"[:60],
    )
    examples = {name: content for name, content in model.files.items() if name.startswith("examples/")}
    imports = CARRIED.format(wheel=package.wheel) if package.wheel else IMPORTS
    return Contents(
        repo_type="space",
        files={
            "README.md": f"{front_matter}{TEXT.format(model=repo_id)}".encode(),
            "app.py": APP.format(model=repo_id, imports=imports).encode(),
            "requirements.txt": "".join(f"{line}\n" for line in package.requirements).encode(),
            **package.files,
            **examples,
        },
        replaces=(WHEELS,),
    )


def page_contents(
    folder: Path,
    repo_id: str,
    *,
    exclude: Sequence[str] = (),
    license: str | None = None,
    secret: str | None = None,
) -> Contents:
    """
    The files of a static Space for a page that `export --format web` wrote, which go up as they are, but for the card.

    Args:
        exclude, license, secret: as for `contents.collect`.

    Raises:
        PublishError: the folder is no such page, or not what was exported.
    """
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder")
    manifest = read_json(folder / MANIFEST) if is_exported(folder) else {}
    if manifest.get("format") != "web":
        raise PublishError(
            f"{folder} is no page, and --space static publishes one: `hf-poolformer export MODEL OUT --format web` "
            "writes it"
        )
    hashes = manifest.get("files")
    for name, sha256 in hashes.items() if isinstance(hashes, dict) else ():
        if Path(name).name != name or not (folder / name).is_file() or digest(folder / name) != sha256:
            raise PublishError(f"{folder} is not what was exported: {name} is missing, or changed; export it again")
    contents = Contents("space", replaces=("vendor/*",))
    rules = EVERYWHERE_LEFT_OUT | dict.fromkeys(exclude, "excluded by you")
    for name in files_in(folder):
        reason = next((why for pattern, why in rules.items() if fnmatch(name, pattern)), None)
        if reason is None:
            contents.files[name] = folder / name
        else:
            contents.left_out[name] = reason
    lacking = [name for name in ("index.html", "page.js", "runtime.js", "web.json") if name not in contents.files]
    if lacking:
        raise PublishError(f"the page is incomplete: {lacking[0]} is missing or excluded")
    if contents.total > MOST_BYTES:
        raise PublishError(f"{folder} has {size_text(contents.total)}, and a Space takes {size_text(MOST_BYTES)}")
    contents.files["README.md"] = page_card(contents, repo_id, license).encode()
    contents.notes.append("README.md gets the metadata of a static Space")
    refuse_secrets(contents, secret)
    return contents


def page_card(contents: Contents, repo_id: str, license: str | None) -> str:
    """The export's card with the metadata of a Space."""
    text = contents.text("README.md") if "README.md" in contents.files else ""
    block = re.match(r"---\r?\n(.*?)\r?\n---[ \t]*\r?\n?", text, re.DOTALL)
    try:
        before = (yaml.safe_load(block[1]) if block else None) or {}
    except yaml.YAMLError as error:
        raise PublishError(f"README.md, the card: its metadata are no YAML: {' '.join(str(error).split())}") from None
    before = before if isinstance(before, dict) else {}
    if license is not None:
        try:
            check_license(license)
        except ValueError as error:
            raise PublishError(str(error)) from None
    made_of = before.get("base_model")
    return space_card(
        repo_id,
        sdk="static",
        app_file="index.html",
        license=license or before.get("license"),
        models=[made_of] if isinstance(made_of, str) else None,
        short_description=f"{repo_id.split('/')[-1]}, computed in the browser"[:60],
        # With these a page may use several threads.
        custom_headers={
            "cross-origin-embedder-policy": "require-corp",
            "cross-origin-opener-policy": "same-origin",
            "cross-origin-resource-policy": "cross-origin",
        },
    ) + (text[block.end() :] if block else text)


def space_card(repo_id: str, **fields: Any) -> str:
    """The metadata of a Space's card."""
    title = re.sub(r"[-_]+", " ", repo_id.split("/")[-1]).strip()
    card = {
        "title": title[:1].upper() + title[1:],
        "emoji": EMOJI,
        "colorFrom": "blue",
        "colorTo": "green",
        **fields,
    }
    known = {name: value for name, value in card.items() if value is not None}
    return f"---\n{yaml.safe_dump(known, sort_keys=False, allow_unicode=True)}---\n"


def licence(model: Contents) -> str | None:
    """Of the model's card."""
    block = re.match(r"---\n(.*?)\n---", model.text("README.md") if "README.md" in model.files else "", re.DOTALL)
    return (yaml.safe_load(block[1]) or {}).get("license") if block else None
