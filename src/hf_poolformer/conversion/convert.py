"""Conversion of published checkpoints into folders of this package, and back.

`read_checkpoint` takes whatever its publisher wrote, finds format, architecture and variant in keys and shapes, and
accounts for every key; `write_checkpoint` writes a complete folder, or the publisher's own format again, bit-equal.
What shapes cannot tell (norm type, epsilons, the order of the head) is a fact of the family, a row of `FAMILIES`.
"""

import errno
import functools
import io
import os
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torchvision.models._meta import _COCO_CATEGORIES, _IMAGENET_CATEGORIES
from transformers import PreTrainedModel
from transformers.image_utils import PILImageResampling

from ..configuration_poolformer import FAMILIES, VARIANTS, MetaFormerConfig, Variant, as_tuple
from ..foundation.errors import one_line
from ..foundation.files import let_others_read
from ..foundation.folders import new_folder
from ..foundation.strict_json import to_json
from ..foundation.tasks import CLASSIFICATION, HEADLESS, Task
from ..image_processing_poolformer import PoolFormerImageProcessor
from ..modeling_poolformer import AUTO_CLASSES
from .architecture import (
    choose_family,
    choose_row,
    config_of_folder,
    contradictions,
    infer_config,
    observe,
    published_variant,
    rows_like,
    split_dense,
    task_of_weights,
)
from .dense_key_maps import IN_BACKBONE, RETINANET, DenseHead, head_of
from .key_maps import FORMATS, OFFICIAL_FIRST, OFFICIAL_SECOND, POINTWISE, TIMM, Format
from .note import ConversionNote
from .weights import ConversionError, FoundCheckpoint, listed, open_checkpoint


__all__ = ["Checkpoint", "ConversionError", "build_model", "convert", "read_checkpoint", "write_checkpoint"]

# In mmdetection's order, which is COCO's without the unused numbers.
COCO = [name for name in _COCO_CATEGORIES if name not in ("__background__", "N/A")]
# Taken where there are as many classes and nobody says what they mean.
CLASS_NAMES = {CLASSIFICATION: _IMAGENET_CATEGORIES, "object-detection": COCO, "instance-segmentation": COCO}
TARGETS = ("hf", "official", "timm")
# Bytes of code, card and settings beside the weights, roughly.
CODE_SIZE = 200_000
# What a folder may hold to be replaced by --overwrite: nothing but what a conversion writes.
OWN_FILES = re.compile(
    r".*\.(safetensors|pth|py)|(config|preprocessor_config|conversion)\.json|README\.md|__pycache__"
)


CardWriter = Callable[..., str]  # (folder, name="what it will be called") -> README.md


@dataclass
class Checkpoint:
    """
    A checkpoint in our terms.

    Attributes:
        config: its configuration.
        tensors: its weights under our bare keys (without `poolformer.` or `metaformer.`), in our shapes.
        task: a row of `TASKS`, or of `HEADLESS`: `BACKBONE` with norms on the feature maps, `ENCODER` without.
        format: the format it was read from.
        family: a key of `FAMILIES`; `None` for an architecture of one's own.
        variant: a key of `VARIANTS` if architecture, classes and (where keys cannot tell) name agree with one only.
        processor: what turns images into its input.
        source: what was read: a file name or a Hub id.
        sha256: of the weights file; `None` if there were several.
        notes: what a reader should know, one line each.
        left_out: keys that the model has no use for: of a dense head that is none of the paper's, of a norm that
            RetinaNet does not use, of what a trainer keeps beside the model.
    """

    config: MetaFormerConfig
    tensors: dict[str, torch.Tensor]
    task: Task
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
    weights: str | None = None,
    card: CardWriter | None = None,
) -> Checkpoint:
    """
    Read `source` and write it to the folder `out_dir`.

    Args:
        source, variant, labels, overrides, weights: as in `read_checkpoint`.
        out_dir, to, overwrite, card: as in `write_checkpoint`.

    Raises:
        ConversionError: nothing has been written then.
    """
    if to not in TARGETS:
        raise ConversionError(f"cannot convert to {to!r}: choose one of {', '.join(TARGETS)}")
    out_dir = Path(out_dir).resolve()
    if out_dir.exists() and Path(source).exists() and Path(source).resolve().is_relative_to(out_dir):
        raise ConversionError(f"{out_dir} holds the checkpoint itself, which would be lost; give another folder")
    check_target(out_dir, overwrite)  # before work is put into it
    checkpoint = read_checkpoint(source, variant=variant, labels=labels, overrides=overrides, weights=weights)
    write_checkpoint(checkpoint, out_dir, to=to, overwrite=overwrite, card=card)
    return checkpoint


def read_checkpoint(
    source: str | os.PathLike,
    *,
    variant: str | None = None,
    labels: Sequence[str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    weights: str | None = None,
) -> Checkpoint:
    """
    Read a checkpoint of any known format, using every key exactly once.

    Args:
        source: a `.pth`, `.pth.tar`, `.bin` or `.safetensors` file; a folder of timm or transformers; or a Hub id.
        variant: a key of `VARIANTS`, or of `FAMILIES` for another size, where keys leave a choice.
        labels: class names; those of ImageNet if there are 1000 classes and the source has none.
        overrides: fields of the configuration that cannot be told from weights, `{"pool_size": 5}`.
        weights: the set of weights to take of a file with several, such as `"state_dict"`; else averaged ones are.

    Returns:
        the checkpoint; its `notes` say what was assumed, since weights do not tell, and what was left out.

    Raises:
        ConversionError: unreadable or unsafe file, foreign or incomplete checkpoint, ambiguous architecture.
    """
    found = open_checkpoint(source, weights)
    overrides = dict(overrides or {})
    tensors, rest = split_dense(found.tensors)
    checkpoint_format = next((fmt for fmt in FORMATS if fmt.recognises(tensors)), None)
    if checkpoint_format is None:
        raise ConversionError(
            f"{found.name} is no PoolFormer or MetaFormer checkpoint: none of the official, timm or transformers "
            f"formats has keys like {listed(sorted(tensors)[:3])}"
        )
    names = checkpoint_format.to_ours(tensors)
    check_keys(found.name, checkpoint_format.name, names)
    tensors = {ours: tensors[theirs] for theirs, ours in names.items()}
    notes = [*found.notes]
    head = head_of(rest)
    left_out = add_head(found.name, tensors, head, rest) if head else [*rest]
    if head and left_out:
        notes.append(f"{head.name} has no use for the norm of the first stage; left out: {', '.join(left_out)}")
    elif left_out:
        notes.append(f"only the backbone was converted; left out: {listed(left_out)}")
    check_tensors(found.name, tensors)
    task = task_of_weights(tensors)
    if found.left_out:
        what = task.name if task in HEADLESS else "model"
        notes.append(f"left out, as no part of the {what}: {listed(found.left_out)}")
        left_out += found.left_out
    timm = found.config if isinstance(found.config.get("architecture"), str) else {}
    has_config = bool(found.config) and not timm
    if has_config:
        config, family = config_of_folder(found, overrides, variant, tensors)
        facts = {key: as_tuple(getattr(config, key)) for key in ("depths", "hidden_sizes", "num_labels", "image_size")}
        row, told = choose_row(family, facts, variant, found.name)
    else:
        facts = observe(tensors, found.name)
        hints = found.model_names
        family = choose_family(facts, checkpoint_format, task, variant, hints, overrides, found.name)
        if variant is None:
            notes += contradictions(hints, family, facts, found.name)
        row, told = choose_row(family, facts, variant, timm_variant(timm) if timm else " ".join(hints.values()))
        config, more = infer_config(facts, family, row, tensors, overrides, found, variant)
        notes += more
    published, note = published_variant(config, task, row, told)
    if note:
        notes.append(note)
    if checkpoint_format is TIMM and family == "poolformer" and task.name == CLASSIFICATION:
        notes.append(
            "timm pools before the final norm, the official code after it; this model does what the official code "
            "does, so its logits differ from timm's"
        )
    if labels is not None and task in HEADLESS:
        raise ConversionError(f"labels were given, but {found.name} has no classifier")
    if (count := timm.get("num_classes")) and task.name == CLASSIFICATION and count != config.num_labels:
        raise ConversionError(f"{found.name}: config.json says {count} classes, the weights have {config.num_labels}")
    own = found.labels if head else timm_labels(timm)
    notes += set_labels(config, labels or own, task, has_config, found.name)
    tensors, more = fit(found.name, config, task, tensors)
    processor, guesses = make_processor(config, task, family, VARIANTS.get(row), found, timm)
    return Checkpoint(
        config=config,
        tensors=tensors,
        task=task,
        format=checkpoint_format,
        family=family,
        variant=published,
        processor=processor,
        source=found.name,
        sha256=found.sha256,
        notes=[*notes, *more, *guesses],
        left_out=left_out,
    )


def build_model(checkpoint: Checkpoint) -> PreTrainedModel:
    """
    The model of a checkpoint with its weights, in evaluation mode.

    Args:
        checkpoint: what `read_checkpoint` returned; its tensors are shared, not copied.
    """
    model = empty_model(checkpoint.config, checkpoint.task)
    keys = model_keys(model)
    model.load_state_dict({keys[bare]: tensor for bare, tensor in checkpoint.tensors.items()}, assign=True)
    return model.eval()


def write_checkpoint(
    checkpoint: Checkpoint,
    out_dir: str | os.PathLike,
    *,
    to: str = "hf",
    overwrite: bool = False,
    card: CardWriter | None = None,
) -> Path:
    """
    Write `checkpoint` to the folder `out_dir`, which appears complete or not at all.

    Args:
        checkpoint: what `read_checkpoint` returned.
        out_dir: the folder.
        overwrite: replace a folder of an earlier conversion.
        to: `"hf"` (configuration, weights, code, processor, `conversion.json`), `"official"` (one `.pth`) or `"timm"`.
        card: what writes the README.md of the format `"hf"`: `hub.cards.folder_card`. Without it there is none, and
            publishing the folder writes it.

    Raises:
        ConversionError: the folder is there already, or the format has no name for some weight.
        UserError: another conversion to it is at work.
    """
    write = {"hf": write_hf, "official": write_official, "timm": write_timm}[to]
    needed = sum(tensor.nbytes for tensor in checkpoint.tensors.values()) + (CODE_SIZE if to == "hf" else 0)
    out_dir, free = Path(out_dir).resolve(), 0
    try:
        with new_folder(out_dir, overwrite, check_target, "conversion") as folder:
            free = shutil.disk_usage(folder).free
            if free < needed:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            write(checkpoint, folder)
            if to == "hf" and card is not None:
                (folder / "README.md").write_text(card(folder, name=out_dir.name), encoding="utf-8", newline="\n")
    except (OSError, SafetensorError) as error:
        raise ConversionError(f"cannot write to {out_dir}: {disk_reason(error, needed, free)}") from error
    return out_dir


def disk_reason(error: BaseException, needed: int, free: int) -> str:
    """What the system said, in a line; with needed and free bytes where it is about room."""
    told = re.search(r"os error (\d+)", str(error))  # safetensors says it in its text
    number = error.errno if isinstance(error, OSError) else int(told[1]) if told else None
    rooms = {
        errno.ENOSPC: "the disk is full",
        errno.EDQUOT: "the disk quota is used up",
        errno.EFBIG: "a file of it would be larger than is allowed here",
    }
    if number not in rooms:
        return os.strerror(number) if number else one_line(error)
    return f"{rooms[number]}: it needs {needed / 1e6:,.2f} MB, {free / 1e6:,.2f} MB are free"


# Dense heads ------------------------------------------------------------------------------------------------


def add_head(
    name: str, tensors: dict[str, torch.Tensor], head: DenseHead, rest: Mapping[str, torch.Tensor]
) -> list[str]:
    """Adds `rest`, neck and head under their publisher's keys, to the backbone's `tensors`; names what has no use."""
    names = head.to_ours(rest)
    check_keys(name, f"{head.publisher} {head.name}", names)
    tensors |= {ours: rest[theirs] for theirs, ours in names.items()}
    # The official backbone may have a norm per stage all the same.
    norms = [key for key in tensors if key.startswith("hidden_states_norms.stage1.")]
    unused = norms if head is RETINANET else []
    for key in unused:
        del tensors[key]
    return [f"{IN_BACKBONE}norm0.{key.rpartition('.')[2]}" for key in unused]


# Checks -----------------------------------------------------------------------------------------------------


def check_keys(name: str, format_name: str, names: Mapping[str, str | None]) -> None:
    unknown = [theirs for theirs, ours in names.items() if ours is None]
    if unknown:
        raise ConversionError(f"{name}: not keys of the {format_name} format: {listed(unknown)}")
    owners: dict[str, str] = {}
    for theirs, ours in names.items():
        if owners.setdefault(ours, theirs) != theirs:
            raise ConversionError(f"{name}: {owners[ours]} and {theirs} both are our {ours}")


# What weights may not be, looked at in this order.
FAULTS: tuple[tuple[str, Callable[[str, torch.Tensor], bool]], ...] = (
    (
        ": weights that are no floating-point numbers:",
        lambda key, tensor: not (tensor.is_floating_point() or key.endswith("num_batches_tracked")),
    ),
    (
        ": weights in 8 bits, which say nothing without their scales:",
        lambda key, tensor: tensor.is_floating_point() and tensor.element_size() < 2,
    ),
    (": weights without numbers, of the device meta:", lambda key, tensor: tensor.is_meta),
    (": weights that are stored sparsely:", lambda key, tensor: tensor.layout is not torch.strided),
    (" is damaged: NaN or infinity in", lambda key, tensor: not tensor.isfinite().all()),
)


def check_tensors(name: str, tensors: Mapping[str, torch.Tensor]) -> None:
    for what, has_fault in FAULTS:
        if faulty := [key for key, tensor in tensors.items() if has_fault(key, tensor)]:
            raise ConversionError(f"{name}{what} {listed(faulty)}")


def fit(
    name: str, config: MetaFormerConfig, task: Task, tensors: Mapping[str, torch.Tensor]
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """
    `tensors` in the order, the shapes and the one precision of the model; 1x1 convolutions may come as matrices and
    vice versa. The second result is a note if precision was changed.
    """
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
    if text := "; ".join(f"{what}: {listed(names)}" for what, names in problems if names):
        raise ConversionError(f"{name} does not fit the model its keys describe, in our names {text}")
    # A folder of transformers has one precision, and reads weights of a higher one rounded to it.
    kinds = sorted(
        {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values() if tensor.is_floating_point()}
    )
    widest = functools.reduce(torch.promote_types, {t.dtype for t in tensors.values() if t.is_floating_point()})
    notes = []
    if len(kinds) > 1:
        notes.append(f"its weights are {' and '.join(kinds)}; all were made {str(widest).removeprefix('torch.')}")
    # Copies: views of one storage cannot be saved, and nothing should refer to the file any more.
    copies = {
        bare: tensors[bare].reshape(targets[key].shape).clone(memory_format=torch.contiguous_format)
        for bare, key in keys.items()
    }
    return {k: v.to(widest) if v.is_floating_point() else v for k, v in copies.items()}, notes


def same_matrix(shape: torch.Size, target: torch.Size) -> bool:
    if len(shape) == len(target):
        return shape == target
    short, long = sorted((tuple(shape), tuple(target)), key=len)
    return len(short) == 2 and long == (*short, 1, 1)


def empty_model(config: MetaFormerConfig, task: Task) -> PreTrainedModel:
    model_class = next(c for c in AUTO_CLASSES[task.auto_class] if c.config_class is type(config))
    try:
        with torch.device("meta"):
            return model_class(config)
    except (ValueError, RuntimeError) as error:
        raise ConversionError(f"no model can be built of this configuration: {one_line(error)}") from error


def model_keys(model: PreTrainedModel) -> dict[str, str]:
    """Bare key -> key of the model's state dict."""
    return {key.removeprefix(f"{model.base_model_prefix}."): key for key in model.state_dict()}


# Labels and processor ---------------------------------------------------------------------------------------


def set_labels(
    config: MetaFormerConfig, labels: Sequence[str] | None, task: Task, has_own: bool, name: str
) -> list[str]:
    """
    `labels`; else what the configuration has; else ImageNet's or, of a detector, COCO's if there are as many, and then
    a note.
    """
    notes = []
    if labels is None:
        known = CLASS_NAMES.get(task.name)
        if has_own or known is None or config.num_labels != len(known):
            return notes
        labels = known
        whose = "ImageNet-1K" if known is _IMAGENET_CATEGORIES else "COCO"
        notes.append(f"its {len(known)} classes were taken for those of {whose}, in their order (--labels for others)")
    if len(labels) != config.num_labels:
        raise ConversionError(f"{len(labels)} labels were given, but {name} has {config.num_labels} classes")
    repeated = [label for label, count in Counter(labels).items() if count > 1]
    if repeated:
        raise ConversionError(f"labels must differ from each other, but repeated are {listed(repeated)}")
    config.id2label = dict(enumerate(labels))
    config.label2id = {label: index for index, label in enumerate(labels)}
    return notes


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
    config: MetaFormerConfig,
    task: Task,
    family: str | None,
    row: Variant | None,
    found: FoundCheckpoint,
    timm: Mapping[str, Any],
) -> tuple[PoolFormerImageProcessor, list[str]]:
    """The source's own processor if it has one, else the one of the dense task or of the variant, and a note."""
    if found.folder is not None and (found.folder / "preprocessor_config.json").is_file():
        try:
            return PoolFormerImageProcessor.from_pretrained(found.folder), []
        except Exception as error:  # whatever an old or foreign file may raise
            raise ConversionError(f"{found.folder}/preprocessor_config.json: {one_line(error)}") from error
    in_config = task.gives == "objects"  # of which anchors and thresholds are
    if task.is_dense:
        processor = task.new_processor()
        assumed = ["sizes, mean and std" + (", anchors and thresholds" if in_config else "") + " of the paper"]
    else:
        processor, assumed = classification_processor(config, family, row, published_sizes(timm, found))
    if config.num_channels != 3:
        assumed.append(f"3 colours, though the model takes {config.num_channels} channels")
    place = "preprocessor_config.json" + (" and config.json" if in_config else "")
    return processor, [f"assumed of its images: {', '.join(assumed)} (in {place})"] if assumed else []


def published_sizes(timm: Mapping[str, Any], found: FoundCheckpoint) -> dict[str, Any]:
    """What timm's folder, or its training that wrote the file, says about images."""
    if published := pretrained_cfg(timm):
        return published
    said = {
        key: found.statements[key]
        for key in ("crop_pct", "mean", "std", "interpolation", "input_size")
        if key in found.statements
    }
    if isinstance(side := found.statements.get("img_size"), int):
        said.setdefault("input_size", (3, side, side))
    return said


def classification_processor(
    config: MetaFormerConfig, family: str | None, row: Variant | None, published: Mapping[str, Any]
) -> tuple[PoolFormerImageProcessor, list[str]]:
    """The processor of a classifier or backbone, and what of it is an assumption."""
    size = row.image_size if row else 224
    if config.model_type == "metaformer":
        size = config.image_size
    common = FAMILIES[family or "poolformer"].crop_pct
    options: dict[str, Any] = {"crop_pct": row.crop_pct if row else common}
    fixed = {"spatial_mlp", "random"} & set(config.token_mixers) or any(config.position_embeddings)
    input_size = published.get("input_size")
    told = isinstance(input_size, (list, tuple)) and len(input_size) == 3
    if told:
        height, width = input_size[1:]
        size = height if height == width else [height, width]
    for theirs, ours in (("crop_pct", "crop_pct"), ("mean", "image_mean"), ("std", "image_std")):
        if published.get(theirs) is not None:
            options[ours] = published[theirs]
    if published.get("interpolation") is not None:
        resample = str(published["interpolation"]).upper()
        options["resample"] = getattr(PILImageResampling, resample, PILImageResampling.BICUBIC)
    height, width = (size, size) if isinstance(size, int) else size
    assumed = [] if told or fixed else [f"{height}x{width} px"]
    assumed += [] if published.get("crop_pct") is not None else [f"crop_pct={options['crop_pct']}"]
    assumed += [] if "image_mean" in options and "image_std" in options else ["mean and std of ImageNet"]
    size = {"shortest_edge": height} if height == width else {"height": height, "width": width}
    return PoolFormerImageProcessor(size=size, crop_size={"height": height, "width": width}, **options), assumed


# Writing ----------------------------------------------------------------------------------------------------


def check_target(out_dir: Path, overwrite: bool) -> None:
    """
    Raises:
        ConversionError: something is there that a conversion may not replace.
    """
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
    let_others_read(folder)
    facts = checkpoint.source, checkpoint.format.name, checkpoint.sha256, checkpoint.variant, tuple(checkpoint.notes)
    ConversionNote(*facts).write(folder)


def write_official(checkpoint: Checkpoint, folder: Path) -> None:
    second = checkpoint.config.embedding_norm != "none"
    content: dict[str, Any] = foreign(checkpoint, OFFICIAL_SECOND if second else OFFICIAL_FIRST)
    if checkpoint.task.is_dense:
        # As mmdetection and mmsegmentation write and read it.
        labels = [checkpoint.config.id2label[index] for index in range(checkpoint.config.num_labels)]
        content = {"meta": {"CLASSES": labels}, "state_dict": content}
    # By way of memory: on a full disk PyTorch's own writer hides what the system says.
    buffer = io.BytesIO()
    torch.save(content, buffer)
    (folder / f"{checkpoint.variant or checkpoint.family or 'model'}.pth").write_bytes(buffer.getbuffer())


def write_timm(checkpoint: Checkpoint, folder: Path) -> None:
    config = checkpoint.config
    strange = sorted(set(config.token_mixers) - set(TIMM.token_mixers))
    if strange:
        raise ConversionError(
            f"timm has no {' and no '.join(strange)} mixer, so these weights would fit no model there"
        )
    save_file(foreign(checkpoint, TIMM), folder / "model.safetensors", metadata={"format": "pt"})
    let_others_read(folder)
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
    (folder / "config.json").write_text(to_json(content, indent=2), encoding="utf-8")


def foreign(checkpoint: Checkpoint, target: Format) -> dict[str, torch.Tensor]:
    """The weights under the keys and in the shapes of `target`."""
    config = checkpoint.config
    head = head_of(checkpoint.tensors, ours=True)
    in_head = head.to_theirs(checkpoint.tensors) if head and target is not TIMM else {}
    backbone = [key for key in checkpoint.tensors if in_head.get(key) is None]
    names = target.to_theirs(backbone, config.position_embeddings)
    if in_head:
        names = {key: theirs and IN_BACKBONE + theirs for key, theirs in names.items()}
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
