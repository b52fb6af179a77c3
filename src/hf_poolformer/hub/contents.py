"""What of a folder goes to the Hub, and in which form: `collect` decides it before anything is sent.

A folder is only read. What must not leave this machine as it is (a path in the settings of a run) or must be cut
(weights in one large file) is made anew elsewhere, in a scratch folder or in memory; the rest goes up byte by byte.
"""

import json
import mmap
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatch
from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub.serialization import save_torch_state_dict
from safetensors import SafetensorError, safe_open

from ..conversion.note import changed_since_conversion
from ..foundation.exported import is_exported, no_model
from ..foundation.files import digest
from ..foundation.redaction import HUB_TOKEN
from ..foundation.settings import names_marked
from ..foundation.strict_json import to_json
from ..settings.training import all_settings
from .dataset_cards import dataset_card
from .eval_results import RESULTS, read_results, results_of_card, text_of
from .metadata import CardError, check_card
from .rendering import local_names, with_repo_id


__all__ = ["Contents", "PublishError", "collect"]

REPO_TYPES = ("model", "dataset")

# What a run leaves beside the model, and why it stays. Patterns of fnmatch, in which a star also crosses a slash.
HIDDEN = "hidden"
EVERYWHERE_LEFT_OUT = {
    ".*": HIDDEN,
    "*/.*": HIDDEN,
    "*__pycache__/*": HIDDEN,
    "*.part": "unfinished",
    "*.tmp": "unfinished",
    "*.lock": "unfinished",
    "*.log": "a log of this machine",
}
MODEL_LEFT_OUT = {
    "checkpoints/*": "training checkpoint with optimiser",
    "checkpoint-*/*": "training checkpoint with optimiser",
    "*optimizer*.bin": "optimiser",
    "*scheduler*.bin": "optimiser",
    "*random_states*": "optimiser",
    "*rng_state*": "optimiser",
    "*training_args.bin": "pickle",
    "*pytorch_model*.bin": "pickle; the safetensors go up",
    "*.pt": "pickle",
    "*.pth": "pickle",
    "*.pth.tar": "pickle",
    "*.pkl": "pickle",
    "*.ckpt": "pickle",
    "*tfevents*": "TensorBoard's events, which name this machine; training_log.jsonl goes up",
    "logs/*": "logs of trackers, which name this machine; training_log.jsonl goes up",
    "runs/*": "logs of trackers, which name this machine; training_log.jsonl goes up",
    "*emissions*.csv": "codecarbon's record, which holds this machine's place; the card tells the sum",
}

# Where the Hub finds results for its leaderboards.
EVAL_RESULTS = ".eval_results/*.yaml"

# The Hub takes no more files than this in one folder, and Parquet is the better form long before.
MAX_FILES = 10_000

# Text that is looked through for paths of this machine before it goes up.
STRUCTURED = (".json", ".jsonl", ".yaml", ".yml")
PROSE = (".md", ".txt", ".csv", ".html", ".py", ".ipynb", ".cfg", ".toml", ".xml")
SEARCHED_BYTES = 32 * 2**20

# Keys under which a place on this machine stands, whatever it looks like: settings, and what configurations call it.
PATH_KEYS = frozenset({"_name_or_path", "logging_dir", *names_marked(all_settings(), "path")})
# Words of the user's own, which may look like anything.
LABELS = frozenset({"id2label", "label2id", "eval_per_class_accuracy", "label_names", "labels"})


class PublishError(RuntimeError):
    """Publishing failed. The message says why in one line and how to go on in a second; it holds no token."""


@dataclass
class Contents:
    """Files for one commit.

    Attributes:
        repo_type: `"model"`, `"dataset"` or `"space"`.
        files: path in the repository -> file on this machine, or the bytes themselves.
        left_out: path in the folder -> why it stays.
        notes: what was changed on the way up, a sentence each.
        replaces: patterns of files in the repository that would be stale beside these, and are deleted by the commit.
    """

    repo_type: str
    files: dict[str, Path | bytes] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    replaces: tuple[str, ...] = ()

    def size(self, name: str) -> int:
        """Bytes of one file."""
        content = self.files[name]
        return len(content) if isinstance(content, bytes) else content.stat().st_size

    @property
    def total(self) -> int:
        """Bytes of all files."""
        return sum(map(self.size, self.files))

    def sha256(self, name: str) -> str:
        content = self.files[name]
        return sha256(content).hexdigest() if isinstance(content, bytes) else digest(content)

    def text(self, name: str) -> str:
        content = self.files[name]
        return (content if isinstance(content, bytes) else content.read_bytes()).decode("utf-8", errors="replace")


def collect(
    folder: str | os.PathLike,
    repo_id: str,
    scratch: str | os.PathLike,
    *,
    repo_type: str = "model",
    exclude: Sequence[str] = (),
    max_shard_size: str | int = "5GB",
    license: str | None = None,
    secret: str | None = None,
) -> Contents:
    """Everything that publishing `folder` as `repo_id` sends; the folder is only read.

    Args:
        scratch: an empty folder for what has to be written anew; must live until the upload is done.
        repo_type: `"model"` or `"dataset"`.
        exclude: further patterns (fnmatch, paths relative to `folder`) of files that stay.
        max_shard_size: safetensors files above this size are cut into shards with an index.
        license: a licence identifier of the Hub, for a card that has to be written because the folder has none.
        secret: the Hub token in use; no file may contain it.

    Raises:
        PublishError: the folder holds no model (or dataset), or something that must not be published.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise PublishError(f"{folder} is not a folder")
    if repo_type not in REPO_TYPES:
        raise PublishError(f"repo_type is {repo_type!r}, but there are: {', '.join(REPO_TYPES)}")
    contents = Contents(repo_type)
    rules = EVERYWHERE_LEFT_OUT | (MODEL_LEFT_OUT if repo_type == "model" else {})
    rules |= dict.fromkeys(exclude, "excluded by you")
    for name in files_in(folder):
        reasons = [why for pattern, why in rules.items() if fnmatch(name, pattern)]
        if repo_type == "model" and fnmatch(name, EVAL_RESULTS):  # hidden from people, but not from the Hub
            reasons = [why for why in reasons if why != HIDDEN]
        if not reasons:
            contents.files[name] = folder / name
        else:
            contents.left_out[name] = reasons[0]
    if len(contents.files) > MAX_FILES:
        raise PublishError(
            f"{folder} holds {len(contents.files)} files, and a commit takes {MAX_FILES}; write the data as Parquet "
            "first (datasets.Dataset.to_parquet)"
        )
    if repo_type == "model":
        check_model(folder, contents)
        shard_weights(contents, Path(scratch), max_shard_size)
    else:
        check_dataset(folder, contents)
    for name in list(contents.files):
        hide_paths(contents, name, folder)
    write_card(contents, folder, repo_id, license)
    if repo_type == "model" and not any(fnmatch(RESULTS, pattern) for pattern in exclude):
        write_results(contents)
    refuse_secrets(contents, secret)
    return contents


def files_in(folder: Path) -> Iterator[str]:
    yield from sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


# A model ----------------------------------------------------------------------------------------------------


def check_model(folder: Path, contents: Contents) -> None:
    """A configuration, all of its weights, all of its code."""
    if is_exported(folder):
        raise PublishError(
            f"{no_model(folder)}. `hf upload USER/NAME {folder}` sends an export as it is, with the card it has; a "
            "page of --format web becomes a Space by --space static"
        )
    weights = [name for name in contents.files if fnmatch(name, "model*.safetensors")]
    if "config.json" not in contents.files or not weights:
        hint = ""
        if any(name.endswith((".bin", ".pth", ".pt", ".tar")) for name in contents.left_out):
            hint = "; scripts/convert.py turns other checkpoints into one"
        raise PublishError(f"{folder} holds no model: config.json and model.safetensors are needed{hint}")
    index = folder / "model.safetensors.index.json"
    if index.is_file() and "model.safetensors" not in weights:
        missing = set(read_json(index).get("weight_map", {}).values()) - set(weights)
        if missing:
            raise PublishError(f"{folder} lacks {', '.join(sorted(missing))}, which {index.name} names")
    check_weight_files(folder, weights)
    config = read_json(folder / "config.json")
    for entry in config.get("auto_map", {}).values():
        module = f"{entry.rpartition('--')[2].split('.')[0]}.py"
        if "--" not in entry and module not in contents.files:
            raise PublishError(
                f"{folder} lacks {module}, the code that config.json names; save the model again with save_pretrained"
            )


def check_weight_files(folder: Path, weights: Sequence[str]) -> None:
    """PublishError for damaged files, and for NaN and infinity: the answers of such a model are none."""
    from ..foundation.errors import UserError
    from ..foundation.finite import all_finite, refuse_weights

    broken = []
    for name in weights:
        try:
            with safe_open(folder / name, framework="pt") as file:
                broken += [key for key in file.keys() if not all_finite(file.get_tensor(key))]  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PublishError(f"{folder / name} is damaged: {error}") from None
    try:
        refuse_weights(broken, str(folder))
    except UserError as error:
        raise PublishError(str(error)) from None


def shard_weights(contents: Contents, scratch: Path, max_shard_size: str | int) -> None:
    """Replaces `model.safetensors` by shards with an index if it is larger than `max_shard_size`."""
    contents.replaces = ("model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json")
    whole = contents.files.get("model.safetensors")
    if whole is None or whole.stat().st_size <= parse_size(max_shard_size):
        return
    from safetensors.torch import load_file

    target = scratch / "weights"
    target.mkdir(parents=True)
    save_torch_state_dict(load_file(whole), target, max_shard_size=max_shard_size, metadata={"format": "pt"})
    shards = {path.name: path for path in sorted(target.iterdir())}
    if list(shards) == ["model.safetensors"]:
        return  # a single tensor that large cannot be cut
    del contents.files["model.safetensors"]
    contents.files |= shards
    contents.notes.append(f"model.safetensors goes up as {len(shards) - 1} shards of at most {max_shard_size}")


def parse_size(size: str | int) -> int:
    """Bytes, from a number or a text like 5GB or 300KB (powers of 1000)."""
    if isinstance(size, int):
        return size
    found = re.fullmatch(r"(\d+(?:\.\d+)?)\s*([KMGT]?)B?", size.strip().upper())
    if not found:
        raise PublishError(f"{size!r} is not a size; write it like 5GB or 300MB")
    return int(float(found[1]) * 1000 ** " KMGT".index(found[2] or " "))


# A dataset --------------------------------------------------------------------------------------------------


def check_dataset(folder: Path, contents: Contents) -> None:
    suffixes = {Path(name).suffix.lower() for name in contents.files}
    if not suffixes & {".parquet", ".tar", ".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff", ".gif"}:
        raise PublishError(f"{folder} holds no images, no Parquet files and no tar shards")
    if "config.json" in contents.files and "model.safetensors" in contents.files:
        raise PublishError(f"{folder} holds a model; publish it without --repo_type dataset")


# The card ---------------------------------------------------------------------------------------------------


def write_card(contents: Contents, folder: Path, repo_id: str, license: str | None) -> None:
    """The folder's card with the repository's name in it, or a new one; its metadata checked."""
    try:
        if "README.md" in contents.files:
            text = text_of_card(contents)
            card = with_repo_id(text, local_names(folder, text), repo_id) if contents.repo_type == "model" else text
            if card != text:
                contents.notes.append(f"in README.md, the folder's name becomes {repo_id} where code loads it")
                contents.files["README.md"] = card.encode()
            check_card(card, contents.repo_type)
            trained = "training_settings.yaml" in contents.files  # here, and the card is the run's
            if not trained and (changed := changed_since_conversion(folder)):
                contents.notes.append(
                    f"README.md was written when the model was converted, and {', '.join(changed)} changed since: is "
                    "it still true? Without it, a new one is written"
                )
            return
        if contents.repo_type == "model":
            from .cards import folder_card  # torch and the models, which an upload as such does not need

            card = folder_card(folder, repo_id=repo_id, license=license)
        else:
            card = dataset_card(folder, contents.files, repo_id=repo_id, license=license)
    except ValueError as error:
        raise PublishError(f"README.md, the card: {error}") from None
    contents.files["README.md"] = card.encode()
    contents.notes.append("README.md is written for you, as the folder has none")


def write_results(contents: Contents) -> None:
    """The results of the card once more, in `.eval_results/`; and a look at what others wrote there."""
    contents.replaces = (*contents.replaces, RESULTS)
    contents.files.pop(RESULTS, None)  # it may be older than the card
    try:
        for name in contents.files:
            if fnmatch(name, EVAL_RESULTS):
                read_results(contents.text(name), name)
        measured, left_out = results_of_card(contents.text("README.md"))
    except CardError as error:
        raise PublishError(str(error)) from None
    contents.notes += left_out
    if measured:
        contents.files[RESULTS] = text_of(each.entry for each in measured).encode()


def text_of_card(contents: Contents) -> str:
    """README.md as text; a byte order mark, behind which nobody would find the metadata, is taken off.

    Raises:
        PublishError: it is in another encoding than UTF-8, the only one the Hub reads.
    """
    content = contents.files["README.md"]
    content = content if isinstance(content, bytes) else content.read_bytes()
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        guess = "UTF-16" if content[:2] in (b"\xff\xfe", b"\xfe\xff") else "ISO-8859-1"
        raise PublishError(
            f"README.md is not UTF-8, which the Hub reads, but perhaps {guess} (byte {content[error.start]:#04x} at "
            f"{error.start}): save it as UTF-8, by `iconv -f {guess} -t UTF-8` for instance"
        ) from None
    if content != text.encode():
        contents.files["README.md"] = text.encode()
        contents.notes.append("README.md goes up without its byte order mark")
    return text


# Secrets ----------------------------------------------------------------------------------------------------


def hide_paths(contents: Contents, name: str, folder: Path) -> None:
    """Replaces paths of this machine in structured text by their last component; refuses them in prose."""
    suffix = Path(name).suffix.lower()
    if suffix not in STRUCTURED + PROSE or contents.size(name) > SEARCHED_BYTES:
        return
    text, private = contents.text(name), private_paths(folder)
    if suffix in STRUCTURED:
        try:
            hidden = hide_in_text(text, suffix, private)
        except (ValueError, yaml.YAMLError):
            hidden = text  # not what its name says, so read as prose below
        if hidden != text:
            contents.files[name] = hidden.encode()
            contents.notes.append(f"in {name}, paths of this machine are cut down to their last part")
            text = hidden
    for number, line in enumerate(text.splitlines(), 1):
        for path in private:
            if holds(line, path):
                raise PublishError(
                    f"{name}, line {number}, holds a path of this machine ({path}); change it there, or leave the "
                    f"file out with --exclude {name}"
                )


def private_paths(folder: Path) -> list[str]:
    """Places on this machine that nobody else needs to know: home, this folder, the working directory."""
    places = {Path.home(), folder.resolve(), folder.resolve().parent, Path.cwd()}
    # One component (`/tmp`, `/data`) tells nothing; a home of one component is root's, and a name all the same.
    return sorted(str(path) for path in places if len(path.parts) > 2 or (path == Path.home() and len(path.parts) > 1))


def holds(text: str, path: str) -> bool:
    return path in text and re.search(rf"(?<![\w.\-]){re.escape(path)}(?![\w\-])", text) is not None


def hide_in_text(text: str, suffix: str, private: Sequence[str]) -> str:
    """`text` as it was, unless a value in it is a path."""
    if suffix == ".jsonl":
        lines = [
            hide_in_text(line, ".json", private).rstrip("\n") if line.strip() else line for line in text.split("\n")
        ]
        return "\n".join(lines)
    value = json.loads(text) if suffix == ".json" else yaml.safe_load(text)
    hidden = without_paths(value, private)
    if hidden == value:
        return text
    if suffix == ".json":
        return to_json(hidden, indent=2 if "\n" in text.strip() else None, ensure_ascii=False) + "\n"
    return yaml.safe_dump(hidden, sort_keys=False, allow_unicode=True)


def without_paths(value: Any, private: Sequence[str], key: str = "") -> Any:
    """A copy of a JSON value in which paths are cut down to their last component."""
    if isinstance(value, Mapping):
        return {
            name: item if name in LABELS else without_paths(item, private, str(name)) for name, item in value.items()
        }
    if isinstance(value, list):
        return [without_paths(item, private, key) for item in value]
    if isinstance(value, str) and is_path(value, private, key):
        return re.split(r"[/\\]", value.rstrip("/\\"))[-1]
    return value


def is_path(text: str, private: Sequence[str], key: str) -> bool:
    absolute = re.match(r"/|~|\.\.|[A-Za-z]:[\\/]|\\\\", text) is not None
    if key in PATH_KEYS:
        return absolute
    if not absolute or len(text) > 4096 or "\n" in text:
        return False
    if any(text == path or text.startswith(path + os.sep) for path in private):
        return True
    return len(Path(text).parts) > 2 and os.path.lexists(text)


def refuse_secrets(contents: Contents, secret: str | None) -> None:
    """A token in a published file is a token in everybody's hands: better not to publish at all."""
    for name, content in contents.files.items():
        where = content if isinstance(content, Path) else name
        if secret and contains(content, secret.encode()):
            raise PublishError(f"{where} contains your Hub token; remove it there, then publish again")
        if Path(name).suffix.lower() in STRUCTURED + PROSE and contents.size(name) <= SEARCHED_BYTES:
            data = content if isinstance(content, bytes) else content.read_bytes()
            if re.search(HUB_TOKEN.encode(), data):
                raise PublishError(
                    f"{where} contains what looks like a Hub token; remove it there, then publish again"
                )


def contains(content: Path | bytes, needle: bytes) -> bool:
    if isinstance(content, bytes):
        return needle in content
    with content.open("rb") as file:
        if content.stat().st_size == 0:
            return False
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
            return data.find(needle) >= 0


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishError(f"{path} cannot be read: {error}") from None
    if not isinstance(value, dict):
        raise PublishError(f"{path} is not a JSON object")
    return value
