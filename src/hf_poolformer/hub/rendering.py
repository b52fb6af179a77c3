"""From facts to the text of a card: `card_template.md`, what is safe to write into it, and the examples in it.

Every card of a model goes through `render_card`: of one that was trained, converted or published here, or exported.
"""

import os
import re
import unicodedata
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import ModelCard, ModelCardData

from ..foundation.names import undecodable_escaped
from ..foundation.tasks import Task
from .metadata import CardError, check_metadata


__all__ = [
    "FIRST_CITATION",
    "SECOND_CITATION",
    "citations_of",
    "clean_line",
    "code_examples",
    "last_component",
    "link",
    "local_names",
    "plain_markdown",
    "render_card",
    "with_repo_id",
]

TEMPLATE = Path(__file__).with_name("card_template.md")

FIRST_CITATION = """@inproceedings{yu2022metaformer,
  title     = {MetaFormer Is Actually What You Need for Vision},
  author    = {Yu, Weihao and Luo, Mi and Zhou, Pan and Si, Chenyang and Zhou, Yichen and Wang, Xinchao and Feng, Jiashi and Yan, Shuicheng},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  pages     = {10819--10829},
  year      = {2022}
}"""  # noqa: E501
SECOND_CITATION = """@article{yu2024metaformer,
  title   = {MetaFormer Baselines for Vision},
  author  = {Yu, Weihao and Si, Chenyang and Zhou, Pan and Luo, Mi and Zhou, Yichen and Feng, Jiashi and Yan, Shuicheng and Wang, Xinchao},
  journal = {IEEE Transactions on Pattern Analysis and Machine Intelligence},
  volume  = {46},
  number  = {2},
  pages   = {896--912},
  year    = {2024},
  doi     = {10.1109/TPAMI.2023.3329173}
}"""  # noqa: E501


def citations_of(model_type: str) -> list[str]:
    """The papers that a model of this type is from."""
    return [FIRST_CITATION] if model_type == "poolformer" else [FIRST_CITATION, SECOND_CITATION]


def render_card(card_data: ModelCardData, *, complete: bool = True, **values: Any) -> str:
    """`card_template.md` with these values, and metadata that are known to be good.

    Args:
        complete: the metadata have to name library, pipeline and licence.
        values: of the template; what is not given, it leaves out. `sections` are (heading, Markdown), from rooms that
            know more about the model, and stand after the results.

    Raises:
        CardError: the metadata would not pass the Hub's validation, or do not survive being written.
    """
    card = ModelCard.from_template(
        card_data, template_str=TEMPLATE.read_text(encoding="utf-8"), md=plain_markdown, **values
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip("\n") + "\n"
    # The block as any other reader would parse it.
    check_metadata(yaml.safe_load(text.split("\n---\n", 1)[0].removeprefix("---\n")), complete=complete)
    if ModelCard(text).data.to_dict() != card_data.to_dict():
        raise CardError("the card's metadata do not survive being written and read back")
    return text


def code_examples(task: Task, place: str, model_type: str, num_channels: int = 3) -> dict[str, str]:
    """How to use a model: by a pipeline, and one step lower, as values of the template.

    Args:
        place: Hub id, or what to call a folder.
        num_channels: of its images.
    """
    # transformers has a PoolFormer of its own, which computes the same function; a MetaFormer needs its code. The
    # examples of dense tasks import this package.
    needs_code = not task.is_dense and not (task.built_in and model_type == "poolformer")
    source = f'"{place}"' + (", trust_remote_code=True" if needs_code else "")
    changes = {"{source}": source}
    if num_channels != 3:  # the image processor reads these itself, from what Pillow cannot open, too
        changes |= {"from PIL import Image\n": "", 'Image.open("photo.jpg").convert("RGB")': '"photo.jpg"'}
    if num_channels not in (1, 3):
        changes['"photo.jpg"'] = '"image.tif"'
    codes = {"pipeline_snippet": task.pipeline_code, "model_snippet": task.model_code}
    for old, new in changes.items():
        codes = {name: code.replace(old, new) for name, code in codes.items()}
    return codes


def local_names(model_dir: str | os.PathLike, card: str) -> list[str]:
    """What the card may call its model while that is still a folder on somebody's machine.

    The folder may have got another name since the card was written; then the title of our own cards tells.
    """
    names = [Path(model_dir).resolve().name, "path/to/this/folder"]
    title = re.search(r"^# (.+)$", card, re.MULTILINE)
    if title and "\n- hf-poolformer\n" in card:
        names.append(re.sub(r"\\([\\`*_{}\[\]#|~$!])", r"\1", title[1]))
    return names


def with_repo_id(text: str, names: Sequence[str], repo_id: str) -> str:
    """The card with `repo_id` where its Python examples load one of `names`, and the repository's name as title.

    All else stays as it is, in the text as in the metadata.
    """
    title = repo_id.rpartition("/")[2]
    for name in names:
        quoted = re.escape(f'"{name}"')
        loads = re.compile(rf"((?:model=|from_pretrained\(|pipeline\([^\n]*, ?)){quoted}")
        text = re.sub(
            r"```python\n.*?```",
            lambda code, loads=loads: loads.sub(rf'\1"{repo_id}"', code[0]),
            text,
            flags=re.DOTALL,
        )
        text = re.sub(
            rf"^# {re.escape(plain_markdown(name))}$", f"# {plain_markdown(title)}", text, count=1, flags=re.MULTILINE
        )
        text = re.sub(
            rf"^(model-index:\n- name: ){re.escape(name)}$", rf"\g<1>{title}", text, count=1, flags=re.MULTILINE
        )
    return text


# Text that is safe in Markdown


def clean_line(text: str) -> str:
    """One line, without control characters and without the marks that reverse the direction of writing."""
    text = undecodable_escaped(text)
    text = "".join(" " if unicodedata.category(char) in ("Cc", "Zl", "Zp") else char for char in text)
    text = "".join(char for char in text if unicodedata.category(char) not in ("Cf", "Cs", "Co", "Cn"))
    return " ".join(text.split())


def plain_markdown(value: Any, longest: int = 200) -> str:
    """Any text as plain text in a Markdown table: no markup, no HTML, no new row or column; cut to `longest`."""
    text = clean_line(str(value))
    text = text if len(text) <= longest else text[: longest - 1] + "…"
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return re.sub(r"([\\`*_{}\[\]#|~$!])", r"\\\1", text)


def link(repo_id: str, kind: str = "") -> str:
    return f"[{plain_markdown(repo_id)}](https://huggingface.co/{kind}{repo_id})"


def last_component(name: str) -> str:
    return clean_line(re.split(r"[/\\]", name.rstrip("/\\"))[-1]) or "unnamed"
