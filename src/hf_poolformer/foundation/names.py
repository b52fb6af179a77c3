"""Names of files and classes, which may hold anything, for people to read; and what a misspelt name may have meant.

Standard library only.
"""

from __future__ import annotations

import difflib
import re
import unicodedata
from collections import Counter
from collections.abc import Collection, Iterable, Sequence


# Join letters and emoji; the other characters of their category hide, or turn the direction of what follows.
_JOINERS = "\u200c\u200d"


def printable(text: str, longest: int | None = None) -> str:
    """A name on one line that every file, terminal and font takes.

    Bytes that are no UTF-8 in file names, control characters and marks that turn the direction of writing become
    escapes such as `\\xe9` and `\\n`.

    Args:
        longest: characters at most; what is longer ends in an ellipsis.
    """
    text = "".join(map(_escaped, text))
    return text if longest is None or len(text) <= longest else text[: longest - 1] + "…"


def _escaped(char: str) -> str:
    category = unicodedata.category(char)
    if category == "Cs":
        return undecodable_escaped(char)
    if category in ("Cc", "Zl", "Zp") or (category == "Cf" and char not in _JOINERS):
        return char.encode("unicode_escape").decode()
    return char


def undecodable_escaped(text: str) -> str:
    """Text in which what stands for undecodable bytes is written out, so that it can be encoded."""
    text = re.sub("[\udc80-\udcff]", lambda match: f"\\x{ord(match[0]) - 0xDC00:02x}", text)
    return text.encode("utf-8", "backslashreplace").decode()


def numbered(names: Sequence[str], taken: Collection[str] = ()) -> list[str]:
    """The same names; of those that occur twice or are `taken` each with its number behind it: `crane (134)`."""
    counts = Counter(names)
    return [
        f"{name} ({index})".lstrip() if counts[name] > 1 or name in taken else name for index, name in enumerate(names)
    ]


# What settings and flags are called in other tools -> here; of several, the first that a command has is meant.
ELSEWHERE: dict[str, tuple[str, ...]] = {
    "aa": ("rand_augment_magnitude",),
    "accum": ("gradient_accumulation_steps",),
    "amp": ("mixed_precision", "dtype"),
    "arch": ("config_name", "model_name_or_path"),
    "architecture": ("config_name", "model_name_or_path"),
    "aug": ("rand_augment_magnitude",),
    "auto_augment": ("rand_augment_magnitude",),
    "batch": ("batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "batch_size": ("batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "batchsize": ("batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "bf16": ("mixed_precision", "dtype"),
    "bs": ("batch_size", "per_device_train_batch_size", "per_device_eval_batch_size"),
    "checkpoint": ("model_name_or_path", "resume_from_checkpoint"),
    "class": ("classes",),
    "clip_grad": ("max_grad_norm",),
    "compile": ("dynamo_backend",),
    "config": ("config_file", "config_name"),
    "cutmix": ("cutmix_alpha",),
    "data": ("dataset_name", "train_dir"),
    "data_dir": ("dataset_name", "train_dir"),
    "data_path": ("dataset_name", "train_dir"),
    "dataloader_num_workers": ("num_workers",),
    "dataset": ("dataset_name",),
    "decay": ("weight_decay",),
    "drop_path": ("drop_path_rate",),
    "ema": ("ema_decay",),
    "epoch": ("num_train_epochs",),
    "epochs": ("num_train_epochs",),
    "eval_batch_size": ("per_device_eval_batch_size",),
    "eval_steps": ("eval_epochs",),
    "eval_strategy": ("eval_epochs",),
    "evaluation_strategy": ("eval_epochs",),
    "fp16": ("mixed_precision", "dtype"),
    "freeze": ("freeze_backbone",),
    "grad_accum": ("gradient_accumulation_steps",),
    "grad_accum_steps": ("gradient_accumulation_steps",),
    "grad_clip": ("max_grad_norm",),
    "half": ("mixed_precision", "dtype"),
    "hflip": ("horizontal_flip",),
    "img_size": ("image_size",),
    "imgsz": ("image_size",),
    "input_size": ("image_size",),
    "j": ("num_workers",),
    "keep_best": ("metric_for_best_model",),
    "layer": ("stage",),
    "licence": ("license",),
    "linear_probe": ("freeze_backbone",),
    "log_interval": ("logging_steps",),
    "lr": ("learning_rate",),
    "max_epochs": ("num_train_epochs",),
    "max_steps": ("max_train_steps",),
    "min_lr": ("min_learning_rate",),
    "mixup": ("mixup_alpha",),
    "model": ("model_name_or_path", "config_name"),
    "model_ema": ("ema_decay",),
    "monitor": ("metric_for_best_model",),
    "name": ("repo_id", "hub_model_id", "dataset_name"),
    "num_epochs": ("num_train_epochs",),
    "num_steps": ("max_train_steps",),
    "opt": ("optimizer",),
    "optim": ("optimizer",),
    "out": ("output", "output_dir"),
    "out_dir": ("output", "output_dir"),
    "outdir": ("output", "output_dir"),
    "output_path": ("output", "output_dir"),
    "patience": ("early_stopping_patience",),
    "precision": ("mixed_precision", "dtype"),
    "pretrained": ("model_name_or_path",),
    "repo": ("repo_id", "hub_model_id"),
    "reprob": ("random_erasing",),
    "resume": ("resume_from_checkpoint",),
    "save_steps": ("checkpointing_steps",),
    "save_strategy": ("checkpointing_steps",),
    "sched": ("lr_scheduler_type",),
    "scheduler": ("lr_scheduler_type",),
    "smoothing": ("label_smoothing",),
    "steps": ("max_train_steps",),
    "target": ("classes",),
    "targets": ("classes",),
    "topk": ("top_k",),
    "torch_compile": ("dynamo_backend",),
    "train_batch_size": ("per_device_train_batch_size",),
    "val_dir": ("validation_dir",),
    "val_split": ("validation_split", "train_val_split", "split"),
    "valid_dir": ("validation_dir",),
    "vflip": ("vertical_flip",),
    "wandb": ("report_to",),
    "warmup": ("num_warmup_epochs", "num_warmup_steps"),
    "warmup_epochs": ("num_warmup_epochs",),
    "warmup_ratio": ("num_warmup_epochs", "num_warmup_steps"),
    "warmup_steps": ("num_warmup_steps",),
    "wd": ("weight_decay",),
    "workers": ("num_workers",),
}


def near_names(name: str, known: Iterable[str], most: int = 2) -> list[str]:
    """Which of the `known` names may have been meant by one that is not among them; dashes count as underscores."""
    known = list(known)
    name = name.replace("-", "_")
    meant = [other for other in ELSEWHERE.get(name.lower(), ()) if other in known][:1]
    alike = difflib.get_close_matches(name, known, n=most, cutoff=0.7)
    return (meant + [other for other in alike if other not in meant])[:most]


def first_few(names: Sequence[object], most: int = 5) -> str:
    """Names for a message, the first of them where they are many."""
    return ", ".join(map(str, names[:most])) + (", ..." if len(names) > most else "")
