"""A Space of the Hub on which a published model can be tried: `hf_poolformer.app` in a repository of its own."""

from __future__ import annotations

import re

import yaml

from ..foundation.machine import version_of
from .contents import Contents


__all__ = ["space_contents"]

# The release of Gradio that the app was last looked at with; the Space installs it.
GRADIO_VERSION = "6.31.0"
EMOJI = "🏊"

APP = '''"""The page of this Space; `hf-poolformer publish --space` wrote it."""

from pathlib import Path

from hf_poolformer.app.interface import serve


examples = Path(__file__).with_name("examples")
page = serve(["{model}"], examples=[examples] if examples.is_dir() else [], host=None)
page.block_thread()
'''

TEXT = """
Try [{model}](https://huggingface.co/{model}): upload an image, paste it or take one with the webcam.

The page is `hf_poolformer.app`; on your own machine it is `hf-poolformer app {model}`.
"""


def space_contents(model: Contents, repo_id: str) -> Contents:
    """The files of a Space for a model.

    Args:
        model: what is published as the model; its card's licence and its `examples/`, images, go over to the Space.
        repo_id: of the model.
    """
    title = re.sub(r"[-_]+", " ", repo_id.split("/")[-1]).strip()
    card = {
        "title": title[:1].upper() + title[1:],
        "emoji": EMOJI,
        "colorFrom": "blue",
        "colorTo": "green",
        "sdk": "gradio",
        "sdk_version": GRADIO_VERSION,
        "app_file": "app.py",
        "pinned": False,
        "license": licence(model),
        "models": [repo_id],
        "short_description": f"Try {repo_id.split('/')[-1]} in the browser"[:60],
    }
    front_matter = yaml.safe_dump(
        {name: value for name, value in card.items() if value is not None}, sort_keys=False, allow_unicode=True
    )
    examples = {name: content for name, content in model.files.items() if name.startswith("examples/")}
    version = version_of("hf-poolformer")  # None if it is run from its source, not installed
    minimum = f">={version}" if version else ""  # so that the Space has what its app.py needs
    return Contents(
        repo_type="space",
        files={
            "README.md": f"---\n{front_matter}---\n{TEXT.format(model=repo_id)}".encode(),
            "app.py": APP.format(model=repo_id).encode(),
            "requirements.txt": f"hf-poolformer[app]{minimum}\n".encode(),
            **examples,
        },
    )


def licence(model: Contents) -> str | None:
    """Of the model's card."""
    block = re.match(r"---\n(.*?)\n---", model.text("README.md") if "README.md" in model.files else "", re.DOTALL)
    return (yaml.safe_load(block[1]) or {}).get("license") if block else None
