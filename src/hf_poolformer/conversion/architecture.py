"""What a checkpoint's keys and shapes tell of its architecture, and where only its name or its reader can tell."""

import inspect
import json
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from difflib import get_close_matches
from typing import Any

import torch

from ..configuration_poolformer import (
    FAMILIES,
    VARIANTS,
    Fixed,
    MetaFormerConfig,
    PoolFormerConfig,
    Variant,
    as_tuple,
    family_of,
)
from ..foundation.errors import one_line
from ..foundation.tasks import BACKBONE, CLASSIFICATION, ENCODER, TASKS, Task
from .dense_key_maps import IN_BACKBONE, head_of
from .key_maps import OFFICIAL_FIRST, STAGES, TIMM, Format
from .weights import ConversionError, FoundCheckpoint, listed


# Fields that do not change what a trained model computes.
NOT_ARCHITECTURE = {
    "drop_path_rate",
    "head_dropout",
    "initializer_range",
    "layer_scale_init_value",
    "_out_features",
    "_out_indices",
}
PARAMETER_FREE = ("pooling", "identity")
# Fields that no weight tells, those of most consequence first, and the values that what is written down may give them.
UNTOLD: dict[str, tuple[Any, ...] | None] = {
    "pool_size": None,
    "attention_head_dim": None,
    "norm_layer": ("group_norm", "layer_norm"),
    "hidden_act": ("gelu", "relu", "silu", "squared_relu"),
    "norm_eps": None,
    "head_norm_first": None,
    "use_residual": None,
}
# How names of ablations say such a field.
NAMED_FIELDS = (
    (r"pool_?(?:size_?)?=?(\d*[13579])", "pool_size", int),
    (r"(gelu|relu|silu)", "hidden_act", str),
    (r"(layer_?norm|ln)", "norm_layer", lambda _: "layer_norm"),
    (r"(group_?norm|gn)", "norm_layer", lambda _: "group_norm"),
    (r"(no_?res(?:idual)?)", "use_residual", lambda _: False),
)


def split_dense(tensors: dict[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """Of a detector or segmenter its backbone, without the prefix, and the rest; anything else as it is."""
    if not any(key.startswith(IN_BACKBONE) for key in tensors):
        return tensors, {}
    backbone = {key.removeprefix(IN_BACKBONE): value for key, value in tensors.items() if key.startswith(IN_BACKBONE)}
    return backbone, {key: value for key, value in tensors.items() if not key.startswith(IN_BACKBONE)}


def task_of_weights(tensors: Mapping[str, torch.Tensor]) -> Task:
    """The task of weights under our keys, as in `Checkpoint.task`."""
    if head := head_of(tensors, ours=True):
        return TASKS[head.task]
    if any(key.startswith("hidden_states_norms.") for key in tensors):
        return BACKBONE
    return TASKS[CLASSIFICATION] if any(key.startswith(("norm.", "classifier.")) for key in tensors) else ENCODER


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
    task = task_of_weights(tensors)
    if task.name == CLASSIFICATION:
        facts["head_type"] = "mlp" if "classifier.fc1.weight" in tensors else "linear"
        last = "classifier.fc2.weight" if facts["head_type"] == "mlp" else "classifier.weight"
        facts["num_labels"] = tensors[last].shape[0] if last in tensors else 0
    elif head := head_of(tensors, ours=True):
        facts |= head.facts(shape)
    elif task is BACKBONE:
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
    task: Task,
    asked: str | None,
    names: Mapping[str, str],
    overrides: Mapping[str, Any],
    name: str,
) -> str | None:
    """The family by keys, then by `--variant`, names or format where pooling and identity look alike."""
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
    hinted = {where: family for where, text in names.items() if (family := name_in(text, families))}
    if len(set(hinted.values())) > 1:
        said = " but ".join(f"{where} says {family}" for where, family in hinted.items())
        raise ConversionError(f"{name}: {said}; keys cannot tell. Say --variant {families[0]}, for instance")
    if hinted:
        return next(iter(hinted.values()))
    # Only PoolFormer was ever a backbone of the official detectors, and timm has no identity mixers.
    norms_of_stages = task.is_dense or task is BACKBONE
    if checkpoint_format is TIMM or (norms_of_stages and checkpoint_format is OFFICIAL_FIRST):
        return next(family for family in families if "pooling" in mixers_of(family))
    raise ConversionError(
        f"{name} may be {' or '.join(families)}: pooling and identity have no weights, so keys cannot tell, nor does "
        f"the name. Say --variant {families[0]} (or one of its sizes, like {families[0]}_s12)"
    )


def contradictions(names: Mapping[str, str], family: str | None, facts: Mapping[str, Any], name: str) -> list[str]:
    """Where names say another family or size than the weights; that of a config.json is an error."""
    notes = []
    for where, text in {text: (where, text) for where, text in names.items()}.values():
        named = name_in(text, [*VARIANTS, *FAMILIES])
        called = VARIANTS[named].family if named in VARIANTS else named
        if called != family and (named or where == "config.json"):
            problem = f"{where} says {named or text}, but its weights are those of {family or 'no published family'}"
            if where == "config.json":
                raise ConversionError(f"{name}: {problem}")
            notes.append(problem)
        elif named in VARIANTS and named not in rows_like(family, facts["depths"], facts["hidden_sizes"]):
            size = f"depths {list(facts['depths'])} and widths {list(facts['hidden_sizes'])}"
            notes.append(f"{where} says {named}, but its weights have {size}")
    return notes


def unlike_family(family: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """What weights say otherwise than the published models of their family."""
    keys = ("norm_layer", "norm_bias", "hidden_act", "use_bias", "use_layer_scale", "res_scale_init_values", "use_mlp")
    found = {}
    for key in (*keys, "mlp_ratio", "position_embeddings", "head_type", "num_channels"):
        reference = FAMILIES[family].config.get(key, getattr(MetaFormerConfig, key))
        if facts.get(key) is not None and facts[key] != reference:
            found[key] = facts[key]
    return found


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
    config: MetaFormerConfig, task: Task, row: str | None, told: bool
) -> tuple[str | None, str | None]:
    """The published checkpoint that this may be, and a note if it may be several."""
    if row is None or task.name != CLASSIFICATION or VARIANTS[row].num_labels != config.num_labels:
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
    found: FoundCheckpoint,
    asked: str | None,
) -> tuple[MetaFormerConfig, list[str]]:
    """
    What was observed, completed by what is written beside the weights, the family and the row of `VARIANTS`;
    `overrides` have the last word. The second result are notes on what was taken from where.
    """
    name = found.name
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
    free = untold_fields(fields, facts)
    said, notes = said_fields(found, facts, [key for key in UNTOLD if key not in overrides])
    said = {key: value for key, value in said.items() if key in free}
    fields |= said
    if said:
        notes.append(f"taken from its name or what is written beside the weights: {written(said)}")

    config_class: type[MetaFormerConfig] = MetaFormerConfig
    if family == "poolformer":
        fixed = {key for key in fields if isinstance(inspect.getattr_static(PoolFormerConfig, key, None), Fixed)}
        if all(as_tuple(fields[key]) == getattr(PoolFormerConfig, key) for key in fixed):
            config_class = PoolFormerConfig
            fields = {key: value for key, value in fields.items() if key not in fixed and key != "image_size"}
    config = make_config(config_class, fields)
    unlike = unlike_family(family, facts) if family else {}
    if unlike:
        notes.append(f"its weights are unlike those of the published {family}: {written(unlike)}")
    if unlike or "config.json" not in found.model_names:
        assumed = {key: getattr(config, key) for key in free if key not in said and key not in overrides}
        told = asked or "token_mixers" in overrides or name_in(" ".join(found.model_names.values()), [family or ""])
        if None in facts["token_mixers"] and not told:
            assumed = {"token_mixers": config.token_mixers, **assumed}
        if assumed:
            example = "pool_size=5" if "pool_size" in assumed else f"{next(iter(assumed))}=..."
            notes.append(f"assumed, since weights do not tell: {written(assumed)} (--set {example} for another)")
    return config, notes


def untold_fields(fields: Mapping[str, Any], facts: Mapping[str, Any]) -> list[str]:
    """The fields that matter to a model of these `fields`, and that its weights do not tell."""
    mixers = fields["token_mixers"] or ()
    has_norm = facts["norm_layer"] != "none"
    matters = {
        "pool_size": "pooling" in mixers,
        "attention_head_dim": "attention" in mixers,
        "norm_layer": facts["norm_layer"] is None,
        "hidden_act": facts["use_mlp"] and facts["hidden_act"] is None,
        "norm_eps": has_norm,
        "head_norm_first": has_norm and "head_type" in facts,
    }
    return [key for key in UNTOLD if matters.get(key, True)]


def said_fields(
    found: FoundCheckpoint, facts: Mapping[str, Any], wanted: Iterable[str]
) -> tuple[dict[str, Any], list[str]]:
    """Of the fields `wanted`, what its trainer wrote down, or called the model; and notes on what contradicts it."""
    fields, notes = {}, []
    for key in wanted:
        said: dict[str, Any] = {}
        if (value := found.statements.get(key)) is not None:
            value = value.lower() if isinstance(value, str) else value
            if value in UNTOLD[key] if UNTOLD[key] else type(value) is type(getattr(MetaFormerConfig, key)):
                said[f"its {key}"] = value
            elif facts.get(key) is None:
                notes.append(f"{key}={value} is written beside the weights, and was not understood")
        for where, text in found.model_names.items():
            for named, field, read in NAMED_FIELDS:
                pattern = rf"(?<![a-z0-9]){named}(?![a-z0-9])"
                if field == key and (match := re.search(pattern, text.lower().replace("-", "_"))):
                    said[where] = read(match[1])
        if len(set(said.values())) > 1:
            text = " but ".join(f"{where} says {key}={value}" for where, value in said.items())
            raise ConversionError(f"{found.name}: {text}; say --set {key}=...")
        for where, value in said.items():
            fields[key] = value
            if facts.get(key) is not None and facts[key] != value:
                notes.append(f"{where} says {key}={value}, but its weights say {key}={facts[key]}")
    return fields, notes


def written(fields: Mapping[str, Any]) -> str:
    """Fields as `--set` takes them."""
    return ", ".join(
        f"{key}={value if isinstance(value, str) else json.dumps(value)}" for key, value in fields.items()
    )


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
    found: FoundCheckpoint, overrides: Mapping[str, Any], asked: str | None, tensors: Mapping[str, torch.Tensor]
) -> tuple[MetaFormerConfig, str | None]:
    """The configuration of a transformers folder, and the family it belongs to; the weights must not contradict it."""
    classes = {config.model_type: config for config in (PoolFormerConfig, MetaFormerConfig)}
    model_type = found.config.get("model_type")
    if model_type not in classes:
        raise ConversionError(f"{found.name} is a {model_type} model, neither of {' and '.join(classes)}")
    try:
        config = classes[model_type].from_dict({**found.config, **overrides})
    except Exception as error:  # huggingface_hub's strict dataclasses wrap many kinds
        raise ConversionError(f"{found.folder}/config.json: {one_line(error)}") from error
    differing = []
    for key, value in observe(tensors, found.name).items():
        theirs = as_tuple(getattr(config, key))
        if key == "token_mixers":
            value = tuple(t if v is None and t in PARAMETER_FREE else v for v, t in zip(value, theirs, strict=False))
        if key == "res_scale_init_values":
            theirs = tuple(None if scale is None else 1.0 for scale in theirs)
        if value is not None and key != "out_features" and value != theirs:
            differing.append(f"{key} is {theirs} there, {value} in the weights")
    if differing:
        raise ConversionError(f"{found.name}: config.json contradicts the weights: {'; '.join(differing)}")
    family = "poolformer" if model_type == "poolformer" else family_of(config)
    if asked is not None and asked not in (family, *(n for n, v in VARIANTS.items() if v.family == family)):
        raise ConversionError(f"{found.name} is no {asked}: its config.json describes {family or 'no known family'}")
    return config, family


def name_in(text: str, names: Iterable[str]) -> str | None:
    """The longest of `names` that is a part of `text` by itself, as `poolformer` is of `poolformer_s12.pth`."""
    text = text.lower().replace("-", "_").replace("in21kft1k", "in21ft1k")
    found = [name for name in names if re.search(rf"(?<![a-z0-9]){name}(?![a-z0-9])", text)]
    return max(found, key=len, default=None)
