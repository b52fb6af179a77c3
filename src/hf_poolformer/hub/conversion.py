"""Conversion of published checkpoints into folders of this package, and back.

`read_checkpoint` takes whatever its publisher wrote, finds format, architecture and variant in keys and shapes, and
accounts for every key; `write_checkpoint` writes a complete folder, or the publisher's own format again, bit-equal.
What shapes cannot tell (norm type, epsilons, the order of the head) is a fact of the family, a row of `FAMILIES`.
"""

import json
import os
import re
import shutil
import tempfile
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from safetensors.torch import save_file
from torchvision.models._meta import _COCO_CATEGORIES, _IMAGENET_CATEGORIES
from transformers import PreTrainedModel
from transformers.image_utils import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD, PILImageResampling

from hf_poolformer.configuration_poolformer import VARIANTS, MetaFormerConfig, Variant
from hf_poolformer.hub.architecture import (
    as_tuple,
    choose_family,
    choose_row,
    config_of_folder,
    infer_config,
    observe,
    published_variant,
    rows_like,
    split_dense,
    task_of,
)
from hf_poolformer.hub.cards import check_metadata
from hf_poolformer.hub.dense_key_maps import BACKBONE, RETINANET, DenseHead, head_of
from hf_poolformer.hub.key_maps import FORMATS, OFFICIAL_FIRST, OFFICIAL_SECOND, POINTWISE, TIMM, TRANSFORMERS, Format
from hf_poolformer.hub.weights import ConversionError, Source, listed, one_line, open_source
from hf_poolformer.image_processing_poolformer import PoolFormerImageProcessor
from hf_poolformer.modeling_poolformer import AUTO_CLASSES


__all__ = ["Checkpoint", "ConversionError", "build_model", "convert", "read_checkpoint", "write_checkpoint"]

AUTO_CLASS = {
    "classifier": "AutoModelForImageClassification",
    "backbone": "AutoBackbone",
    "encoder": "AutoModel",
    "segmenter": "AutoModelForSemanticSegmentation",
    "detector": "AutoModelForObjectDetection",
    "instance segmenter": "AutoModelForInstanceSegmentation",
}
PIPELINES = {
    "classifier": "image-classification",
    "segmenter": "image-segmentation",
    "detector": "object-detection",
    "instance segmenter": "image-segmentation",
}
DENSE_TASKS = ("segmenter", "detector", "instance segmenter")
# In mmdetection's order, which is COCO's without the unused numbers.
COCO = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]
TARGETS = ("hf", "official", "timm")
# What a folder may hold to be replaced by --overwrite: nothing but what a conversion writes.
OWN_FILES = re.compile(r".*\.(safetensors|pth|py)|config\.json|preprocessor_config\.json|README\.md|__pycache__")


@dataclass
class Checkpoint:
    """
    A checkpoint in our terms.

    Attributes:
        config: its configuration.
        tensors: its weights under our bare keys (without `poolformer.` or `metaformer.`), in our shapes.
        task: `"classifier"`, `"backbone"` (norms on the feature maps), `"encoder"` (neither), or that of a dense head:
            `"segmenter"`, `"detector"`, `"instance segmenter"`.
        format: the format it was read from.
        family: a key of `FAMILIES`; `None` for an architecture of one's own.
        variant: a key of `VARIANTS` if architecture, classes and (where keys cannot tell) name agree with one only.
        processor: what turns images into its input.
        source: what was read: a file name or a Hub id.
        sha256: of the weights file; `None` if there were several.
        notes: what a reader should know, one line each.
        left_out: keys that the model has no use for: of a dense head that is none of the paper's, of a norm that
            RetinaNet does not use.
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
    tensors, rest = split_dense(found.tensors)
    checkpoint_format = next((fmt for fmt in FORMATS if fmt.recognises(tensors)), None)
    if checkpoint_format is None:
        raise ConversionError(
            f"{found.name} is no PoolFormer or MetaFormer checkpoint: none of the official, timm or transformers "
            f"formats has keys like {listed(sorted(tensors)[:3])}"
        )
    names = checkpoint_format.to_ours(tensors)
    check_names(found.name, checkpoint_format.name, names)
    tensors = {ours: tensors[theirs] for theirs, ours in names.items()}
    notes = [*found.notes]
    head = head_of(rest)
    left_out = add_head(found.name, tensors, head, rest) if head else [*rest]
    if head and left_out:
        notes.append(f"{head.name} has no use for the norm of the first stage; left out: {', '.join(left_out)}")
    elif left_out:
        notes.append(f"only the backbone was converted; left out: {', '.join(left_out)}")
    check_numbers(found.name, tensors)
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
    if labels is not None and task in ("backbone", "encoder"):
        raise ConversionError(f"labels were given, but {found.name} has no classifier")
    own = found.labels if head else timm_labels(timm)
    set_labels(config, labels or own, task, bool(found.config) and not timm, found.name)
    tensors = fit(found.name, config, task, tensors)
    return Checkpoint(
        config=config,
        tensors=tensors,
        task=task,
        format=checkpoint_format,
        family=family,
        variant=published,
        processor=make_processor(config, task, VARIANTS.get(row), found, timm),
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


# Dense heads ------------------------------------------------------------------------------------------------


def add_head(
    name: str, tensors: dict[str, torch.Tensor], head: DenseHead, rest: Mapping[str, torch.Tensor]
) -> list[str]:
    """Adds `rest`, neck and head under their publisher's keys, to the backbone's `tensors`; names what has no use."""
    names = head.to_ours(rest)
    check_names(name, f"{head.publisher} {head.name}", names)
    tensors |= {ours: rest[theirs] for theirs, ours in names.items()}
    # The official backbone may have a norm per stage all the same.
    norms = [key for key in tensors if key.startswith("hidden_states_norms.stage1.")]
    unused = norms if head is RETINANET else []
    for key in unused:
        del tensors[key]
    return [f"{BACKBONE}norm0.{key.rpartition('.')[2]}" for key in unused]


# Checks -----------------------------------------------------------------------------------------------------


def check_names(name: str, format_name: str, names: Mapping[str, str | None]) -> None:
    unknown = [theirs for theirs, ours in names.items() if ours is None]
    if unknown:
        raise ConversionError(f"{name}: not keys of the {format_name} format: {listed(unknown)}")
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


def set_labels(config: MetaFormerConfig, labels: Sequence[str] | None, task: str, has_own: bool, name: str) -> None:
    """`labels`; else what the configuration has; else ImageNet's or, of a detector, COCO's if there are as many."""
    if labels is None:
        known = {"classifier": _IMAGENET_CATEGORIES, "detector": COCO, "instance segmenter": COCO}.get(task)
        if has_own or known is None or config.num_labels != len(known):
            return
        labels = known
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
    config: MetaFormerConfig, task: str, row: Variant | None, found: Source, timm: Mapping[str, Any]
) -> PoolFormerImageProcessor:
    """The source's own processor if it has one, else the one of the dense task or of the variant."""
    if found.folder is not None and (found.folder / "preprocessor_config.json").is_file():
        try:
            return PoolFormerImageProcessor.from_pretrained(found.folder)
        except Exception as error:  # whatever an old or foreign file may raise
            raise ConversionError(f"{found.folder}/preprocessor_config.json: {one_line(error)}") from error
    if task == "segmenter":
        return PoolFormerImageProcessor.for_segmentation()
    if task in DENSE_TASKS:
        return PoolFormerImageProcessor.for_detection()
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
    content: dict[str, Any] = foreign(checkpoint, OFFICIAL_SECOND if second else OFFICIAL_FIRST)
    if checkpoint.task in DENSE_TASKS:
        # As mmdetection and mmsegmentation write and read it.
        labels = [checkpoint.config.id2label[index] for index in range(checkpoint.config.num_labels)]
        content = {"meta": {"CLASSES": labels}, "state_dict": content}
    torch.save(content, folder / f"{checkpoint.variant or checkpoint.family or 'model'}.pth")


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
    head = head_of(checkpoint.tensors, ours=True)
    in_head = head.to_theirs(checkpoint.tensors) if head and target is not TIMM else {}
    backbone = [key for key in checkpoint.tensors if in_head.get(key) is None]
    names = target.to_theirs(backbone, config.position_embeddings)
    if in_head:
        names = {key: theirs and BACKBONE + theirs for key, theirs in names.items()}
        names |= {key: theirs for key, theirs in in_head.items() if theirs is not None}
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
    pipeline = PIPELINES.get(checkpoint.task) if config.num_labels else None
    data = ModelCardData(
        library_name="transformers",
        pipeline_tag=pipeline or "image-feature-extraction",
        license="apache-2.0",
        tags=["vision", config.model_type, "hf-poolformer"],
        datasets=["imagenet-1k"] if row and row.num_labels == 1000 else None,
    )
    check_metadata(data.to_dict())
    title = checkpoint.variant or checkpoint.family or config.model_type
    if head := head_of(checkpoint.tensors, ours=True):
        title = f"{head.name} on {title}"
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
    if checkpoint.left_out and not head:
        lines.append(f"- the backbone alone; {len(checkpoint.left_out)} tensors of the rest were left out")
    auto = AUTO_CLASS[checkpoint.task]
    built_in = config.model_type == "poolformer" and checkpoint.task in ("classifier", "encoder")
    code = "" if built_in else ", trust_remote_code=True"
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
