"""Conversion of published checkpoints into folders of this package, and back.

`read_checkpoint` takes whatever its publisher wrote, finds format, architecture and variant in keys and shapes, and
accounts for every key; `write_checkpoint` writes a complete folder, or the publisher's own format again, bit-equal.
What shapes cannot tell (norm type, epsilons, the order of the head) is a fact of the family, a row of `FAMILIES`.
"""

import argparse
import hashlib
import inspect
import json
import math
import os
import pickle
import re
import shutil
import tempfile
import warnings
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData, hf_hub_download
from huggingface_hub.errors import EntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torchvision.models._meta import _IMAGENET_CATEGORIES
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from hf_poolformer.configuration_poolformer import (
    FAMILIES,
    VARIANTS,
    Fixed,
    MetaFormerConfig,
    PoolFormerConfig,
    Variant,
)
from hf_poolformer.hub.cards import check_metadata
from hf_poolformer.hub.key_maps import (
    FORMATS,
    OFFICIAL_FIRST,
    OFFICIAL_SECOND,
    POINTWISE,
    STAGES,
    TIMM,
    TRANSFORMERS,
    Format,
)
from hf_poolformer.image_processing_poolformer import PoolFormerImageProcessor
from hf_poolformer.modeling_poolformer import AUTO_CLASSES


__all__ = ["Checkpoint", "ConversionError", "build_model", "convert", "read_checkpoint", "write_checkpoint"]

# What a trainer may have wrapped the weights in. As timm does, averaged weights are preferred where there are both.
WRAPPERS = ("state_dict_ema", "model_ema", "state_dict", "model_state_dict", "model")
PREFIXES = ("module.", "_orig_mod.")
BACKBONE = "backbone."  # of mmdetection and mmsegmentation
WEIGHTS = ("model*.safetensors", "pytorch_model*.bin", "*.safetensors", "*.pth", "*.pth.tar")
AUTO_CLASS = {
    "classifier": "AutoModelForImageClassification",
    "backbone": "AutoBackbone",
    "encoder": "AutoModel",
}
# Fields that do not change what a trained model computes.
NOT_ARCHITECTURE = {"drop_path_rate", "initializer_range", "layer_scale_init_value", "_out_features", "_out_indices"}
PARAMETER_FREE = ("pooling", "identity")
TARGETS = ("hf", "official", "timm")
# What a folder may hold to be replaced by --overwrite: nothing but what a conversion writes.
OWN_FILES = re.compile(r".*\.(safetensors|pth|py)|config\.json|preprocessor_config\.json|README\.md|__pycache__")


class ConversionError(ValueError):
    """A checkpoint that cannot be read or written; the message, one line, says why and what to do."""


@dataclass
class Checkpoint:
    """
    A checkpoint in our terms.

    Attributes:
        config: its configuration.
        tensors: its weights under our bare keys (without `poolformer.` or `metaformer.`), in our shapes.
        task: `"classifier"`, `"backbone"` (norms on the feature maps) or `"encoder"` (neither).
        format: the format it was read from.
        family: a key of `FAMILIES`; `None` for an architecture of one's own.
        variant: a key of `VARIANTS` if architecture, classes and (where keys cannot tell) name agree with one only.
        processor: what turns images into its input.
        source: what was read: a file name or a Hub id.
        sha256: of the weights file; `None` if there were several.
        notes: what a reader should know, one line each.
        left_out: keys of a dense head that were not converted.
    """

    config: MetaFormerConfig
    tensors: dict[str, torch.Tensor]
    task: str
    format: Format
    family: str | None
    variant: str | None
    processor: PoolFormerImageProcessor
    source: str
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)
    left_out: list[str] = field(default_factory=list)


@dataclass
class Source:
    """Files of a checkpoint as found: what to call it, its weights, and what lies beside them."""

    name: str
    tensors: dict[str, torch.Tensor]
    config: dict[str, Any] = field(default_factory=dict)
    folder: Path | None = None
    sha256: str | None = None
    notes: list[str] = field(default_factory=list)


def convert(
    source: str | os.PathLike,
    out_dir: str | os.PathLike,
    *,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    to: str = "hf",
    overwrite: bool = False,
    overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """
    Read `source` and write it to the folder `out_dir`; see `read_checkpoint` and `write_checkpoint`.

    Raises:
        ConversionError: nothing has been written then.
    """
    if to not in TARGETS:
        raise ConversionError(f"cannot convert to {to!r}: choose one of {', '.join(TARGETS)}")
    check_target(Path(out_dir), overwrite)
    checkpoint = read_checkpoint(source, variant=variant, labels=labels, overrides=overrides)
    write_checkpoint(checkpoint, out_dir, to=to, overwrite=overwrite)
    return checkpoint


def read_checkpoint(
    source: str | os.PathLike,
    *,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Checkpoint:
    """
    Read a checkpoint of any known format, using every key exactly once.

    Args:
        source: a `.pth`, `.pth.tar`, `.bin` or `.safetensors` file; a folder of timm or transformers; or a Hub id.
        variant: a key of `VARIANTS`, or of `FAMILIES` for another size, where keys leave a choice.
        labels: class names; those of ImageNet if there are 1000 classes and the source has none.
        overrides: fields of the configuration that cannot be told from weights, `{"pool_size": 5}`.

    Raises:
        ConversionError: unreadable or unsafe file, foreign or incomplete checkpoint, ambiguous architecture.
    """
    found = open_source(source)
    overrides = dict(overrides or {})
    tensors, left_out = unwrap_backbone(found.tensors)
    checkpoint_format = next((fmt for fmt in FORMATS if fmt.recognises(tensors)), None)
    if checkpoint_format is None:
        raise ConversionError(
            f"{found.name} is no PoolFormer or MetaFormer checkpoint: none of the official, timm or transformers "
            f"formats has keys like {listed(sorted(tensors)[:3])}"
        )
    names = checkpoint_format.to_ours(tensors)
    check_names(found.name, checkpoint_format, names)
    tensors = {ours: tensors[theirs] for theirs, ours in names.items()}
    check_numbers(found.name, tensors)

    notes = [*found.notes]
    if left_out:
        notes.append(f"only the backbone was converted; left out: {', '.join(left_out)}")
    task = task_of(tensors)
    timm = found.config if isinstance(found.config.get("architecture"), str) else {}
    if checkpoint_format is TRANSFORMERS and found.config:
        config, family = config_of_folder(found, overrides, variant)
        facts = {key: as_tuple(getattr(config, key)) for key in ("depths", "hidden_sizes", "num_labels", "image_size")}
        row, told = choose_row(family, facts, variant, found.name)
    else:
        facts = observe(tensors, found.name)
        hint = timm.get("architecture", found.name)
        family = choose_family(facts, checkpoint_format, task, variant, hint, overrides, found.name)
        row, told = choose_row(family, facts, variant, timm_variant(timm) if timm else hint)
        config = infer_config(facts, family, row, tensors, overrides, found.name)
    published, note = published_variant(config, task, row, told)
    if note:
        notes.append(note)
    if checkpoint_format is TIMM and family == "poolformer" and task == "classifier":
        notes.append(
            "timm pools before the final norm, the official code after it; this model does what the official code "
            "does, so its logits differ from timm's"
        )
    if labels is not None and task != "classifier":
        raise ConversionError(f"labels were given, but {found.name} has no classifier")
    set_labels(config, labels or timm_labels(timm), bool(found.config) and not timm, found.name)
    tensors = fit(found.name, config, task, tensors)
    return Checkpoint(
        config=config,
        tensors=tensors,
        task=task,
        format=checkpoint_format,
        family=family,
        variant=published,
        processor=make_processor(config, VARIANTS.get(row), found, timm),
        source=found.name,
        sha256=found.sha256,
        notes=notes,
        left_out=left_out,
    )


def build_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """The model of `checkpoint` with its weights, in evaluation mode; its tensors are shared, not copied."""
    model = empty_model(checkpoint.config, checkpoint.task)
    keys = model_keys(model)
    model.load_state_dict({keys[bare]: tensor for bare, tensor in checkpoint.tensors.items()}, assign=True)
    return model.eval()


def write_checkpoint(
    checkpoint: Checkpoint, out_dir: str | os.PathLike, *, to: str = "hf", overwrite: bool = False
) -> Path:
    """
    Write `checkpoint` to the folder `out_dir`, which appears complete or not at all.

    Args:
        checkpoint: what `read_checkpoint` returned.
        out_dir: the folder; a folder of an earlier conversion is replaced if `overwrite`.
        to: `"hf"` (configuration, weights, code, processor, card), `"official"` (one `.pth`) or `"timm"`.

    Raises:
        ConversionError: the folder is there already, or the format has no name for some weight.
    """
    out_dir = Path(out_dir).absolute()
    check_target(out_dir, overwrite)
    write = {"hf": write_hf, "official": write_official, "timm": write_timm}[to]
    try:
        out_dir.parent.mkdir(parents=True, exist_ok=True)
        part = Path(tempfile.mkdtemp(prefix=f".{out_dir.name}.", dir=out_dir.parent))
    except OSError as error:
        raise ConversionError(f"cannot write to {out_dir}: {one_line(error)}") from error
    try:
        new, old = part / "new", part / "old"
        new.mkdir()
        write(checkpoint, new)
        if out_dir.exists():
            out_dir.rename(old)
        try:
            new.rename(out_dir)
        except OSError:
            if old.exists():
                old.rename(out_dir)
            raise
    except OSError as error:
        raise ConversionError(f"cannot write to {out_dir}: {one_line(error)}") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return out_dir


# Files ------------------------------------------------------------------------------------------------------


def open_source(source: str | os.PathLike) -> Source:
    path = Path(source)
    if path.is_dir():
        return open_folder(path, path.resolve().name)
    if path.is_file():
        tensors, notes = load_weights(path)
        return Source(path.name, tensors, sha256=sha256_of(path), notes=notes)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and path.suffix not in (".pth", ".tar", ".bin"):
        return open_folder(download(str(source)), str(source))
    raise ConversionError(f"{source}: no such file or folder, and not the id of a repository on the Hub")


def open_folder(folder: Path, name: str) -> Source:
    config = {}
    if (folder / "config.json").is_file():
        try:
            config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ConversionError(f"{folder / 'config.json'} is not JSON: {one_line(error)}") from error
        if not isinstance(config, dict):
            raise ConversionError(f"{folder / 'config.json'} is no configuration: it holds no JSON object")
    files = next((found for glob in WEIGHTS if (found := sorted(folder.glob(glob)))), [])
    if not files:
        raise ConversionError(f"{name}: no weights in this folder (looked for {', '.join(WEIGHTS)})")
    if len(files) > 1 and not all(re.search(r"-\d+-of-\d+\.", file.name) for file in files):
        raise ConversionError(f"{name}: which file? {', '.join(file.name for file in files)}; give its path")
    tensors, notes = {}, []
    for file in files:
        shard, more = load_weights(file)
        tensors.update(shard)
        notes += more
    if not config:
        name = files[0].name
    return Source(name, tensors, config, folder, sha256_of(files[0]) if len(files) == 1 else None, notes)


def download(repo_id: str) -> Path:
    """The folder of the Hub's cache with the configuration and the weights of a repository."""

    def fetch(*files: str) -> Path:
        for file in files:
            try:
                return Path(hf_hub_download(repo_id, file))
            except EntryNotFoundError as error:
                missing = error
        raise missing

    try:
        folder = fetch("config.json").parent
        fetch("model.safetensors", "pytorch_model.bin")
        with suppress(EntryNotFoundError):
            fetch("preprocessor_config.json")
    except Exception as error:  # of the network, the Hub or the disk: many kinds, none of them ours
        raise ConversionError(
            f"{repo_id} is neither a file or folder here nor could it be fetched from the Hub: {one_line(error)}"
        ) from error
    return folder


def load_weights(path: Path) -> tuple[dict[str, torch.Tensor], list[str]]:
    """The state dict in a file, without wrappers and prefixes, and notes on what was chosen."""
    content = load_safetensors(path) if path.suffix == ".safetensors" else load_pickle(path)
    notes = []
    wrapper = next((key for key in WRAPPERS if isinstance(content, Mapping) and key in content), None)
    if wrapper and isinstance(content[wrapper], Mapping):
        if sum(key in content for key in WRAPPERS) > 1:
            notes.append(f"{path.name} holds several sets of weights; {wrapper} was taken")
        content = content[wrapper]
    if not isinstance(content, Mapping) or not content:
        raise ConversionError(f"{path} holds no state dict but {type(content).__name__}")
    others = [key for key, value in content.items() if not (isinstance(key, str) and isinstance(value, torch.Tensor))]
    if others:
        raise ConversionError(f"{path} is no state dict: no named tensors are {listed(map(str, others))}")
    state_dict = dict(content)
    for prefix in PREFIXES:
        if all(key.startswith(prefix) for key in state_dict):
            state_dict = {key.removeprefix(prefix): value for key, value in state_dict.items()}
    return state_dict, notes


def load_safetensors(path: Path) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(
            f"{path} is truncated or no safetensors file ({one_line(error)}); download it again"
        ) from error


def load_pickle(path: Path) -> Any:
    """Unpickles tensors and plain containers only, so that no code in the file can run."""
    try:
        # timm keeps its parsed command line, which is harmless, beside the weights.
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about pickle protocols; what matters is raised
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL ([\w.]+)", str(error))
        if found:
            raise ConversionError(
                f"{path} was refused: besides tensors it holds {found[1]}, which could run code when loaded. "
                "Ask its publisher for a plain state dict or safetensors"
            ) from error
        raise ConversionError(
            f"{path} is no PyTorch checkpoint, or none that can be loaded without running code in it"
        ) from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise ConversionError(
            f"{path} is truncated or no PyTorch file ({one_line(error) or 'end of file'}); download it again"
        ) from error


def sha256_of(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


# Architecture -----------------------------------------------------------------------------------------------


def unwrap_backbone(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Of a detector or segmenter its backbone, and the keys of the rest; anything else as it is."""
    if not any(key.startswith(BACKBONE) for key in tensors):
        return tensors, []
    backbone = {key.removeprefix(BACKBONE): value for key, value in tensors.items() if key.startswith(BACKBONE)}
    return backbone, [key for key in tensors if not key.startswith(BACKBONE)]


def task_of(tensors: Mapping[str, torch.Tensor]) -> str:
    if any(key.startswith("hidden_states_norms.") for key in tensors):
        return "backbone"
    return "classifier" if any(key.startswith(("norm.", "classifier.")) for key in tensors) else "encoder"


def observe(tensors: Mapping[str, torch.Tensor], name: str) -> dict[str, Any]:
    """The fields of a configuration that keys and shapes tell; `None` in `token_mixers` for one without weights."""
    block_keys: dict[int, dict[int, set[str]]] = {i: {} for i in STAGES}
    for key in tensors:
        if found := re.match(r"encoder\.block\.(\d+)\.(\d+)\.(.+)", key):
            block_keys.setdefault(int(found[1]), {}).setdefault(int(found[2]), set()).add(found[3])
    if sorted(block_keys) != list(STAGES) or not all(block_keys.values()):
        count = sum(bool(stage) for stage in block_keys.values())
        raise ConversionError(f"{name}: a MetaFormer has four stages, here are blocks of {count}")
    for i, stage in block_keys.items():
        if lacking := [str(j) for j in range(min(max(stage) + 1, 1000)) if j not in stage]:
            raise ConversionError(
                f"{name}: of the blocks 0 to {max(stage)} of stage {i + 1} these lack: {listed(lacking)}"
            )
    first = [stage[0] for stage in block_keys.values()]

    def shape(key: str) -> torch.Size:
        if key not in tensors:
            raise ConversionError(f"{name} is incomplete: nothing maps to {key}")
        return tensors[key].shape

    def has(part: str) -> bool:
        return any(part in keys for keys in first)

    def embedding(part: str, start: int = 0) -> bool:
        return any(f"encoder.patch_embeddings.{i}.{part}" in tensors for i in STAGES if i >= start)

    projections = [shape(f"encoder.patch_embeddings.{i}.projection.weight") for i in STAGES]
    if any(len(projection) != 4 for projection in projections):
        raise ConversionError(f"{name}: the stem and downsamplings should be convolutions, with weights of 4 axes")
    kernels = [projection[-1] for projection in projections]
    if kernels != [7, 3, 3, 3]:
        raise ConversionError(f"{name}: kernels {kernels} of stem and downsamplings instead of [7, 3, 3, 3]")
    widths = [projection[0] for projection in projections]
    facts: dict[str, Any] = {
        "num_channels": projections[0][1],
        "depths": tuple(len(stage) for stage in block_keys.values()),
        "hidden_sizes": tuple(widths),
        "token_mixers": tuple(mixer_of(keys) for keys in first),
        "embedding_norm": "layer_norm" if embedding("pre_norm.weight", 1) or embedding("post_norm.weight") else "none",
        "position_embeddings": tuple(f"encoder.patch_embeddings.{i}.position_embeddings" in tensors for i in STAGES),
        "use_layer_scale": has("layer_scale_1"),
        "res_scale_init_values": tuple(1.0 if "res_scale_1" in keys else None for keys in first),
        "use_mlp": has("output.conv1.weight"),
        "norm_layer": None,
    }
    if facts["use_mlp"]:
        facts["mlp_ratio"] = shape("encoder.block.0.0.output.conv1.weight")[0] / widths[0]
        facts["use_bias"] = has("output.conv1.bias")
        facts["hidden_act"] = "star_relu" if has("output.act_fn.scale") else None
    if not has("before_norm.weight"):
        facts["norm_layer"] = "none"
    else:
        facts["norm_bias"] = has("before_norm.bias")
        if has("before_norm.running_mean"):
            facts["norm_layer"] = "batch_norm"
    task = task_of(tensors)
    if task == "classifier":
        facts["head_type"] = "mlp" if "classifier.fc1.weight" in tensors else "linear"
        last = "classifier.fc2.weight" if facts["head_type"] == "mlp" else "classifier.weight"
        facts["num_labels"] = tensors[last].shape[0] if last in tensors else 0
    elif task == "backbone":
        facts["out_features"] = [
            f"stage{i + 1}" for i in STAGES if f"hidden_states_norms.stage{i + 1}.weight" in tensors
        ]
    return facts


def mixer_of(keys: set[str]) -> str | None:
    """The token mixer of a block by its keys, `None` for pooling or identity, which have none."""
    mixers = {
        "qkv.weight": "attention",
        "fc.weight": "spatial_mlp",
        "random_matrix": "random",
        "dwconv.weight": "separable_conv",
        "weight": "depthwise_conv",
    }
    return next((mixer for key, mixer in mixers.items() if f"token_mixer.{key}" in keys), None)


def choose_family(
    facts: Mapping[str, Any],
    checkpoint_format: Format,
    task: str,
    asked: str | None,
    hint: str,
    overrides: Mapping[str, Any],
    name: str,
) -> str | None:
    """The family by keys, then by `--variant`, file name or format where pooling and identity look alike."""
    seen = facts["token_mixers"]
    families = [family for family in FAMILIES if agrees(family, facts)]
    if asked is not None:
        family = VARIANTS[asked].family if asked in VARIANTS else asked
        if family not in FAMILIES:
            near = get_close_matches(asked, [*VARIANTS, *FAMILIES], n=3) or [*FAMILIES]
            raise ConversionError(f"unknown variant {asked!r}; near it are {', '.join(near)}")
        if family not in families:
            what = f"its keys are those of {' or '.join(families)}" if families else "no published family has its keys"
            raise ConversionError(f"{name} is no {asked}: {what}")
        return family
    if "token_mixers" in overrides:
        mixers = tuple(overrides["token_mixers"])
        return next((family for family in families if mixers_of(family) == mixers), None)
    if len(families) == 1:
        return families[0]
    if not families:
        if None in seen:
            unclear = ", ".join(str(i + 1) for i in STAGES if seen[i] is None)
            raise ConversionError(
                f"{name}: no published family mixes tokens like this, and the mixers of stages {unclear} have no "
                f"weights; say which they are, for instance --set token_mixers='{json.dumps(['pooling'] * 4)}'"
            )
        return None
    if hinted := name_in(hint, families):
        return hinted
    # Only PoolFormer was ever a backbone of the official detectors, and timm has no identity mixers.
    if checkpoint_format is TIMM or (task == "backbone" and checkpoint_format is OFFICIAL_FIRST):
        return next(family for family in families if "pooling" in mixers_of(family))
    raise ConversionError(
        f"{name} may be {' or '.join(families)}: pooling and identity have no weights, so keys cannot tell, nor does "
        f"the name. Say --variant {families[0]} (or one of its sizes, like {families[0]}_s12)"
    )


def mixers_of(family: str) -> tuple[str, ...]:
    return FAMILIES[family].config.get("token_mixers", PoolFormerConfig.token_mixers)


def agrees(family: str, facts: Mapping[str, Any]) -> bool:
    if FAMILIES[family].config.get("embedding_norm", "none") != facts["embedding_norm"]:
        return False
    pairs = zip(mixers_of(family), facts["token_mixers"], strict=True)
    return all(mixer in PARAMETER_FREE if seen is None else mixer == seen for mixer, seen in pairs)


def rows_like(family: str, depths: Sequence[int], hidden_sizes: Sequence[int]) -> dict[str, Variant]:
    """The variants of one family and size."""
    size = (tuple(depths), tuple(hidden_sizes))
    return {
        name: variant
        for name, variant in VARIANTS.items()
        if variant.family == family and (variant.config["depths"], variant.config["hidden_sizes"]) == size
    }


def choose_row(
    family: str | None, facts: Mapping[str, Any], asked: str | None, hint: str | None
) -> tuple[str | None, bool]:
    """The row of `VARIANTS` to take facts from, and whether something but its being the first of its size tells it."""
    rows = rows_like(family, facts["depths"], facts["hidden_sizes"]) if family else {}
    if asked in VARIANTS:
        if asked not in rows:
            config = VARIANTS[asked].config
            raise ConversionError(
                f"--variant {asked} has depths {config['depths']} and widths {config['hidden_sizes']}, the checkpoint "
                f"{facts['depths']} and {facts['hidden_sizes']}; for other sizes say --variant {family}"
            )
        return asked, True
    for key in ("num_labels", "image_size"):
        if facts.get(key) is not None:
            rows = {name: row for name, row in rows.items() if getattr(row, key) == facts[key]} or rows
    if hinted := name_in(hint or "", rows):
        return hinted, True
    return next(iter(rows), None), len(rows) == 1


def published_variant(
    config: MetaFormerConfig, task: str, row: str | None, told: bool
) -> tuple[str | None, str | None]:
    """The published checkpoint that this may be, and a note if it may be several."""
    if row is None or task != "classifier" or VARIANTS[row].num_labels != config.num_labels:
        return None, None
    reference = MetaFormerConfig.from_variant(row)
    architecture = set(MetaFormerConfig.__annotations__) - NOT_ARCHITECTURE
    if any(as_tuple(getattr(config, key)) != as_tuple(getattr(reference, key)) for key in architecture):
        return None, None
    if not told:
        return None, f"taken as {row}, but published weights of other trainings have the same shapes; see --variant"
    return row, None


def infer_config(
    facts: Mapping[str, Any],
    family: str | None,
    row: str | None,
    tensors: Mapping[str, torch.Tensor],
    overrides: Mapping[str, Any],
    name: str,
) -> MetaFormerConfig:
    """What was observed, completed by the family and the row of `VARIANTS`; `overrides` have the last word."""
    if family is not None:
        known = dict(FAMILIES[family].config)
    elif facts["embedding_norm"] == "layer_norm":
        known = {**FAMILIES["poolformerv2"].config, "token_mixers": None}
    else:
        known = {}
    if family is None and {"attention", "separable_conv"} & set(facts["token_mixers"]):
        known["norm_layer"] = "layer_norm"  # as all families with these have
    fields = {**known, **(VARIANTS[row].config if row else {})}
    fields |= {key: value for key, value in facts.items() if value is not None and key != "token_mixers"}
    if family is None:
        fields["token_mixers"] = facts["token_mixers"]
    elif family == "poolformer":
        fields["token_mixers"] = PoolFormerConfig.token_mixers
    if "image_size" not in overrides and (size := fixed_image_size(facts, tensors, name)):
        fields["image_size"] = size
    fields |= overrides

    config_class: type[MetaFormerConfig] = MetaFormerConfig
    if family == "poolformer":
        fixed = {key for key in fields if isinstance(inspect.getattr_static(PoolFormerConfig, key, None), Fixed)}
        if all(as_tuple(fields[key]) == getattr(PoolFormerConfig, key) for key in fixed):
            config_class = PoolFormerConfig
            fields = {key: value for key, value in fields.items() if key not in fixed and key != "image_size"}
    return make_config(config_class, fields)


def make_config(config_class: type[MetaFormerConfig], fields: Mapping[str, Any]) -> MetaFormerConfig:
    unknown = [key for key in fields if not hasattr(config_class, key) and key not in ("out_features", "num_labels")]
    if unknown:
        raise ConversionError(f"{config_class.__name__} has no field {listed(unknown)}")
    try:
        return config_class(**fields)
    except Exception as error:  # huggingface_hub's strict dataclasses wrap many kinds
        raise ConversionError(f"no configuration can be made of this: {one_line(error)}") from error


def fixed_image_size(
    facts: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], name: str
) -> int | list[int] | None:
    """The input size in pixels that position embeddings or token matrices were made for; `None` if there are none."""
    for i in STAGES:
        stride = 4 * 2**i
        if (positions := tensors.get(f"encoder.patch_embeddings.{i}.position_embeddings")) is not None:
            height, width = (side * stride for side in positions.shape[-2:])
            return height if height == width else [height, width]
        matrix = {"spatial_mlp": "fc.weight", "random": "random_matrix"}.get(facts["token_mixers"][i])
        if matrix:
            count = tensors[f"encoder.block.{i}.0.token_mixer.{matrix}"].shape[0]
            side = math.isqrt(count)
            if side * side != count:
                raise ConversionError(
                    f"{name} mixes {count} tokens in stage {i + 1}, which is no square; say --set image_size="
                    f"[HEIGHT,WIDTH]"
                )
            return side * stride
    return None


def config_of_folder(
    found: Source, overrides: Mapping[str, Any], asked: str | None
) -> tuple[MetaFormerConfig, str | None]:
    """The configuration of a transformers folder, and the family it belongs to."""
    classes = {config.model_type: config for config in (PoolFormerConfig, MetaFormerConfig)}
    model_type = found.config.get("model_type")
    if model_type not in classes:
        raise ConversionError(f"{found.name} is a {model_type} model, neither of {' and '.join(classes)}")
    try:
        config = classes[model_type].from_dict({**found.config, **overrides})
    except Exception as error:  # huggingface_hub's strict dataclasses wrap many kinds
        raise ConversionError(f"{found.folder}/config.json: {one_line(error)}") from error
    family = "poolformer" if model_type == "poolformer" else family_of(config)
    if asked is not None and asked not in (family, *(n for n, v in VARIANTS.items() if v.family == family)):
        raise ConversionError(f"{found.name} is no {asked}: its config.json describes {family or 'no known family'}")
    return config, family


def family_of(config: MetaFormerConfig) -> str | None:
    """The family that agrees in every field in which families differ."""
    fields = set().union(*(family.config for family in FAMILIES.values()))

    def same(family: str) -> bool:
        reference = FAMILIES[family].config
        return all(as_tuple(getattr(config, k)) == reference.get(k, getattr(MetaFormerConfig, k)) for k in fields)

    return next((family for family in FAMILIES if same(family)), None)


# Checks -----------------------------------------------------------------------------------------------------


def check_names(name: str, checkpoint_format: Format, names: Mapping[str, str | None]) -> None:
    unknown = [theirs for theirs, ours in names.items() if ours is None]
    if unknown:
        raise ConversionError(f"{name}: not keys of the {checkpoint_format.name} format: {listed(unknown)}")
    owners: dict[str, str] = {}
    for theirs, ours in names.items():
        if owners.setdefault(ours, theirs) != theirs:
            raise ConversionError(f"{name}: {owners[ours]} and {theirs} both are our {ours}")


def check_numbers(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    whole = [k for k, v in tensors.items() if not v.is_floating_point() and not k.endswith("num_batches_tracked")]
    if whole:
        raise ConversionError(f"{name}: weights that are no floating-point numbers: {listed(whole)}")
    sparse = [key for key, tensor in tensors.items() if tensor.layout is not torch.strided]
    if sparse:
        raise ConversionError(f"{name}: weights that are stored sparsely: {listed(sparse)}")
    broken = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
    if broken:
        raise ConversionError(f"{name} is damaged: NaN or infinity in {listed(broken)}")


def fit(
    name: str, config: MetaFormerConfig, task: str, tensors: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """`tensors` in the order and the shapes of the model; 1x1 convolutions may come as matrices and vice versa."""
    model = empty_model(config, task)
    keys, targets = model_keys(model), model.state_dict()
    missing = [bare for bare in keys if bare not in tensors]
    unused = [bare for bare in tensors if bare not in keys]
    wrong = [
        f"{bare} {tuple(tensors[bare].shape)} instead of {tuple(targets[key].shape)}"
        for bare, key in keys.items()
        if bare in tensors and not same_matrix(tensors[bare].shape, targets[key].shape)
    ]
    problems = [("missing", missing), ("not used", unused), ("of another shape", wrong)]
    if text := "; ".join(f"{what}: {', '.join(names)}" for what, names in problems if names):
        raise ConversionError(f"{name} does not fit the model its keys describe, in our names {text}")
    # Copies: views of one storage cannot be saved, and nothing should refer to the file any more.
    return {
        bare: tensors[bare].reshape(targets[key].shape).clone(memory_format=torch.contiguous_format)
        for bare, key in keys.items()
    }


def same_matrix(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) == len(target):
        return shape == target
    short, long = sorted((tuple(shape), tuple(target)), key=len)
    return len(short) == 2 and long == (*short, 1, 1)


def empty_model(config: MetaFormerConfig, task: str) -> PreTrainedModel:
    model_class = next(c for c in AUTO_CLASSES[AUTO_CLASS[task]] if c.config_class is type(config))
    try:
        with torch.device("meta"):
            return model_class(config)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"no model can be built of this configuration: {one_line(error)}") from error


def model_keys(model: PreTrainedModel) -> dict[str, str]:
    """Bare key -> key of the model's state dict."""
    return {key.removeprefix(f"{model.base_model_prefix}."): key for key in model.state_dict()}


# Labels and processor ---------------------------------------------------------------------------------------


def set_labels(config: MetaFormerConfig, labels: Sequence[str] | None, has_own: bool, name: str) -> None:
    """`labels`; else what the configuration has; else ImageNet's if there are 1000 classes."""
    if labels is None:
        if has_own or config.num_labels != len(_IMAGENET_CATEGORIES):
            return
        labels = _IMAGENET_CATEGORIES
    if len(labels) != config.num_labels:
        raise ConversionError(f"{len(labels)} labels were given, but {name} has {config.num_labels} classes")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise ConversionError(f"labels must differ from each other, but repeated are {listed(repeated)}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}


def pretrained_cfg(timm: Mapping[str, Any]) -> dict[str, Any]:
    published = timm.get("pretrained_cfg")
    return published if isinstance(published, dict) else {}


def timm_labels(timm: Mapping[str, Any]) -> list[str] | None:
    labels = timm.get("label_names") or pretrained_cfg(timm).get("label_names")
    return [str(label) for label in labels] if isinstance(labels, list) and labels else None


def timm_variant(timm: Mapping[str, Any]) -> str | None:
    """The variant by timm's architecture and tag; `None` if it is none of the published ones."""
    name = f"{timm['architecture']}.{pretrained_cfg(timm).get('tag')}"
    return next((ours for ours, row in VARIANTS.items() if row.timm_name == name), None)


def make_processor(
    config: MetaFormerConfig, row: Variant | None, found: Source, timm: Mapping[str, Any]
) -> PoolFormerImageProcessor:
    """The source's own processor if it has one, else the one of the variant."""
    if found.folder is not None and (found.folder / "preprocessor_config.json").is_file():
        try:
            return PoolFormerImageProcessor.from_pretrained(found.folder)
        except Exception as error:  # whatever an old or foreign file may raise
            raise ConversionError(f"{found.folder}/preprocessor_config.json: {one_line(error)}") from error
    size = row.image_size if row else 224
    if config.model_type == "metaformer":
        size = config.image_size
    options = {"crop_pct": row.crop_pct if row else 0.9}
    if row is None and config.embedding_norm != "none":
        options["crop_pct"] = 1.0
    if published := pretrained_cfg(timm):
        height, width = published.get("input_size", (3, 224, 224))[1:]
        size = height if height == width else [height, width]
        options["crop_pct"] = published.get("crop_pct", options["crop_pct"])
        options["image_mean"] = published.get("mean", IMAGENET_DEFAULT_MEAN)
        options["image_std"] = published.get("std", IMAGENET_DEFAULT_STD)
        resample = str(published.get("interpolation", "bicubic")).upper()
        options["resample"] = getattr(PILImageResampling, resample, PILImageResampling.BICUBIC)
    height, width = (size, size) if isinstance(size, int) else size
    size = {"shortest_edge": height} if height == width else {"height": height, "width": width}
    return PoolFormerImageProcessor(size=size, crop_size={"height": height, "width": width}, **options)


# Writing ----------------------------------------------------------------------------------------------------


def check_target(out_dir: Path, overwrite: bool) -> None:
    if not out_dir.exists():
        return
    if not out_dir.is_dir():
        raise ConversionError(f"{out_dir} is a file; give a folder")
    content = sorted(path.name for path in out_dir.iterdir())
    if content and not overwrite:
        raise ConversionError(f"{out_dir} is not empty; give another folder, or --overwrite")
    strange = [name for name in content if not OWN_FILES.fullmatch(name)]
    if strange:
        raise ConversionError(f"{out_dir} holds more than a conversion writes, and is not replaced: {listed(strange)}")


def write_hf(checkpoint: Checkpoint, folder: Path) -> None:
    model = build_model(checkpoint)
    model.save_pretrained(folder)
    checkpoint.processor.save_pretrained(folder)
    (folder / "README.md").write_text(card(checkpoint, model), encoding="utf-8", newline="\n")


def write_official(checkpoint: Checkpoint, folder: Path) -> None:
    second = checkpoint.config.embedding_norm != "none"
    tensors = foreign(checkpoint, OFFICIAL_SECOND if second else OFFICIAL_FIRST)
    torch.save(tensors, folder / f"{checkpoint.variant or checkpoint.family or 'model'}.pth")


def write_timm(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    strange = sorted(set(config.token_mixers) - set(TIMM.token_mixers))
    if strange:
        raise ConversionError(
            f"timm has no {' and no '.join(strange)} mixer, so these weights would fit no model there"
        )
    save_file(foreign(checkpoint, TIMM), folder / "model.safetensors", metadata={"format": "pt"})
    rows = rows_like(checkpoint.family, config.depths, config.hidden_sizes) if checkpoint.family else {}
    name = checkpoint.variant or next(iter(rows), None)
    if name is None or VARIANTS[name].timm_name is None:
        checkpoint.notes.append(
            "timm has no name for this architecture, so there is no config.json beside the weights"
        )
        return
    architecture, _, tag = VARIANTS[name].timm_name.partition(".")
    crop = checkpoint.processor.crop_size
    published = {
        "num_classes": config.num_labels,
        "input_size": [config.num_channels, crop["height"], crop["width"]],
        "pool_size": [crop["height"] // 32, crop["width"] // 32],
        "crop_pct": checkpoint.processor.crop_pct,
        "crop_mode": "center",
        "interpolation": PILImageResampling(checkpoint.processor.resample).name.lower(),
        "mean": list(checkpoint.processor.image_mean),
        "std": list(checkpoint.processor.image_std),
        "first_conv": "stem.conv",
        "classifier": "head.fc.fc2" if config.head_type == "mlp" else "head.fc",
        "license": "apache-2.0",
        **({"tag": tag} if checkpoint.variant else {}),
    }
    content = {
        "architecture": architecture,
        "num_classes": config.num_labels,
        "num_features": config.hidden_sizes[-1],
        "label_names": [config.id2label[index] for index in range(config.num_labels)],
        "pretrained_cfg": published,
    }
    (folder / "config.json").write_text(json.dumps(content, indent=2), encoding="utf-8")


def foreign(checkpoint: Checkpoint, target: Format) -> dict[str, torch.Tensor]:
    """The weights under the keys and in the shapes of `target`."""
    config = checkpoint.config
    names = target.to_theirs(checkpoint.tensors, config.position_embeddings)
    unknown = [ours for ours, theirs in names.items() if theirs is None]
    if unknown:
        raise ConversionError(f"the {target.name} format has no names for {listed(unknown)}")
    tensors = {}
    for ours, tensor in checkpoint.tensors.items():
        found = POINTWISE.fullmatch(ours)
        if found and target.stores_matrices(config.token_mixers[int(found[1])]):
            tensor = tensor.flatten(1)
        tensors[names[ours]] = tensor
    return tensors


def card(checkpoint: Checkpoint, model: PreTrainedModel) -> str:
    """A short model card: what this is, where it came from, what was not checked."""
    config = checkpoint.config
    row = VARIANTS.get(checkpoint.variant)
    classifier = checkpoint.task == "classifier" and config.num_labels > 0
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag="image-classification" if classifier else "image-feature-extraction",
        license="apache-2.0",
        tags=["vision", config.model_type, "hf-poolformer"],
        datasets=["imagenet-1k"] if row and row.num_labels == 1000 else None,
    )
    check_metadata(data.to_dict())
    title = checkpoint.variant or checkpoint.family or config.model_type
    lines = [
        f"# {title}",
        "",
        f"Weights of {title}, {model.num_parameters():,} parameters, converted without change from "
        f"`{checkpoint.source.replace('`', '')}`, a checkpoint in the {checkpoint.format.name} format"
        + (f" (SHA-256 `{checkpoint.sha256}`)." if checkpoint.sha256 else "."),
        "",
        f"- depths {list(config.depths)}, widths {list(config.hidden_sizes)}, mixers {', '.join(config.token_mixers)}",
        "- papers: [PoolFormer](https://arxiv.org/abs/2111.11418), [MetaFormer baselines]"
        "(https://arxiv.org/abs/2210.13452)",
    ]
    if row:
        lines.append(f"- the authors' checkpoint of this architecture: {row.source}")
    if row and row.top1:
        lines.append(
            f"- ImageNet-1K top-1 that the authors report for theirs: {row.top1} % (not measured again here, and not "
            "checked that this is the same file)"
        )
    if checkpoint.left_out:
        lines.append(f"- the backbone alone; {len(checkpoint.left_out)} tensors of the rest were left out")
    auto = AUTO_CLASS[checkpoint.task]
    code = "" if config.model_type == "poolformer" else ", trust_remote_code=True"
    lines += [
        "",
        "```python",
        f"from transformers import AutoImageProcessor, {auto}",
        "",
        f'processor = AutoImageProcessor.from_pretrained("path/or/id"{code})',
        f'model = {auto}.from_pretrained("path/or/id"{code})',
        "```",
    ]
    return f"---\n{data.to_yaml()}\n---\n\n" + "\n".join(lines) + "\n"


# Words ------------------------------------------------------------------------------------------------------


def name_in(text: str, names: Iterable[str]) -> str | None:
    """The longest of `names` that is a part of `text` by itself, as `poolformer` is of `poolformer_s12.pth`."""
    text = text.lower().replace("-", "_").replace("in21kft1k", "in21ft1k")
    found = [name for name in names if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text)]
    return max(found, key=len, default=None)


def listed(names: Iterable[str]) -> str:
    return ", ".join(names)


def as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


def one_line(error: BaseException) -> str:
    text = " ".join(str(error).split())
    return text if len(text) < 300 else text[:297] + "..."
