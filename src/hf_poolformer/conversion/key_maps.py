"""How each publisher names the parameters of a MetaFormer: one table per format, read in both directions.

A rule pairs a foreign key with ours. `{i}` is a stage, `{j}` a block, both counted from 0, `{n}` another number and
`{p}` the rest of the key; the first rule that fits wins. Our keys are written bare here, without the
`poolformer.` or `metaformer.` that classifiers put before `encoder.`.
"""

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cached_property

from ..token_mixers import TOKEN_MIXERS


Rule = tuple[str, str]

STAGES = range(4)

# Inside a block; all formats agree on what is not listed here.
BLOCK = (
    ("norm1.{p}", "before_norm.{p}"),
    ("norm2.{p}", "after_norm.{p}"),
    ("mlp.fc{n}.{p}", "output.conv{n}.{p}"),
    ("mlp.act.{p}", "output.act_fn.{p}"),
    ("token_mixer.act1.{p}", "token_mixer.act.{p}"),
    ("token_mixer.{p}", "token_mixer.{p}"),
)
# Parameters are vectors in modules of their own in the second paper's code and in timm, but not in the first's.
SCALE_PARAMETERS = (("layer_scale_{n}", "layer_scale_{n}"),)
SCALE_MODULES = (("layer_scale{n}.scale", "layer_scale_{n}"), ("res_scale{n}.scale", "res_scale_{n}"))
FEATURE_NORMS = tuple((f"norm{2 * i}.{{p}}", f"hidden_states_norms.stage{i + 1}.{{p}}") for i in STAGES)
HEAD = (("norm.{p}", "norm.{p}"), ("head.{p}", "classifier.{p}"))
STEM = "encoder.patch_embeddings.0"
DOWNSAMPLE = "encoder.patch_embeddings.{i}"


def blocks(prefix: str, *rules: Rule) -> tuple[Rule, ...]:
    return tuple((prefix + theirs, "encoder.block.{i}.{j}." + ours) for theirs, ours in rules)


@dataclass(frozen=True)
class KeyMap:
    """
    Attributes:
        name: for messages and cards.
        rules: (foreign key, our key) templates.
    """

    name: str
    rules: tuple[Rule, ...]

    @cached_property
    def readers(self) -> list[tuple[re.Pattern, str]]:
        return [(pattern(theirs), ours) for theirs, ours in self.rules]

    @cached_property
    def writers(self) -> list[tuple[re.Pattern, str]]:
        return [(pattern(ours), theirs) for theirs, ours in self.rules]

    def to_ours(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Each foreign key with our bare one; `None` where there is no such key."""
        return {key: rename(key, self.readers) for key in keys}

    def to_theirs(self, keys: Iterable[str]) -> dict[str, str | None]:
        """Each of our bare keys with the foreign one; `None` where there is no such key."""
        return {key: rename(key, self.writers) for key in keys}


@dataclass(frozen=True)
class Format(KeyMap):
    """
    The naming of one publisher.

    Attributes:
        marker: a pattern that at least one key of every checkpoint matches, and none of other formats.
        stores_matrices: whether the 1x1 convolutions of a stage with this mixer are stored as (out, in) matrices.
        numbers_network: whether stages, downsamplings and position embeddings share the numbers of one module list.
        token_mixers: mixers its code has.
    """

    marker: str
    stores_matrices: Callable[[str], bool] = lambda mixer: False
    numbers_network: bool = False
    token_mixers: tuple[str, ...] = tuple(TOKEN_MIXERS)

    def recognises(self, keys: Iterable[str]) -> bool:
        return any(re.match(self.marker, key) for key in keys)

    def to_ours(self, keys: Iterable[str]) -> dict[str, str | None]:
        if not self.numbers_network:
            return super().to_ours(keys)
        plain, parts = {key: key for key in keys}, network_parts(keys)
        for key in keys:
            if found := re.match(r"network\.(\d+)\.", key):
                plain[key] = f"{parts[int(found[1])]}.{key[found.end() :]}"
        return {key: rename(name, self.readers) for key, name in plain.items()}

    def to_theirs(self, keys: Iterable[str], position_embeddings: Iterable[bool]) -> dict[str, str | None]:
        renamed = super().to_theirs(keys)
        if self.numbers_network:
            numbers = {part: number for number, part in enumerate(network_order(position_embeddings))}
            for key, theirs in renamed.items():
                if theirs and (found := re.match(r"(?:down|position|blocks)\.\d+", theirs)):
                    renamed[key] = f"network.{numbers[found[0]]}{theirs[found.end() :]}"
        return renamed


def pattern(template: str) -> re.Pattern:
    def group(found: re.Match) -> str:
        return f"(?P<{found[1]}>{'.+' if found[1] == 'p' else '[0-9]+'})"

    return re.compile(re.sub(r"\\\{(\w)\\\}", group, re.escape(template)))


def rename(key: str, rules: list[tuple[re.Pattern, str]]) -> str | None:
    for source, target in rules:
        if found := source.fullmatch(key):
            return target.format(**found.groupdict())
    return None


def network_order(position_embeddings: Iterable[bool]) -> list[str]:
    """What the entries of the first paper's `network` are, in order (its stem is not among them)."""
    order = []
    for i, has_positions in enumerate(position_embeddings):
        order += [f"down.{i}"] * (i > 0) + [f"position.{i}"] * has_positions + [f"blocks.{i}"]
    return order


def network_parts(keys: Iterable[str]) -> dict[int, str]:
    """The same, told from the keys of a checkpoint: number -> part."""
    found = [match for key in keys if (match := re.match(r"network\.(\d+)\.(\w+)", key))]
    kinds = {int(match[1]): {"proj": "down", "pos_embed": "position"}.get(match[2], "blocks") for match in found}
    stage, parts = 0, {}
    for number in sorted(kinds):
        stage += kinds[number] == "down"
        parts[number] = f"{kinds[number]}.{stage}"
    return parts


# sail-sg/poolformer: models/poolformer.py and models/metaformer.py.
OFFICIAL_FIRST = Format(
    name="official (first paper)",
    marker=r"patch_embed\.proj\.",
    rules=(
        ("patch_embed.proj.{p}", f"{STEM}.projection.{{p}}"),
        ("down.{i}.proj.{p}", f"{DOWNSAMPLE}.projection.{{p}}"),
        ("position.{i}.pos_embed", f"{DOWNSAMPLE}.position_embeddings"),
        *blocks("blocks.{i}.{j}.", *BLOCK, *SCALE_PARAMETERS),
        *FEATURE_NORMS,
        *HEAD,
    ),
    numbers_network=True,
)
# sail-sg/metaformer: metaformer_baselines.py.
OFFICIAL_SECOND = Format(
    name="official (second paper)",
    marker=r"downsample_layers\.0\.conv\.",
    rules=(
        ("downsample_layers.{i}.conv.{p}", f"{DOWNSAMPLE}.projection.{{p}}"),
        ("downsample_layers.{i}.pre_norm.{p}", f"{DOWNSAMPLE}.pre_norm.{{p}}"),
        ("downsample_layers.{i}.post_norm.{p}", f"{DOWNSAMPLE}.post_norm.{{p}}"),
        *blocks("stages.{i}.{j}.", *BLOCK, *SCALE_MODULES),
        *HEAD,
    ),
    stores_matrices=lambda mixer: True,
)
# timm: models/metaformer.py. Its stages with attention work on (B, N, C).
TIMM = Format(
    name="timm",
    marker=r"stem\.conv\.",
    rules=(
        ("stem.conv.{p}", f"{STEM}.projection.{{p}}"),
        ("stem.norm.{p}", f"{STEM}.post_norm.{{p}}"),
        ("stages.{i}.downsample.conv.{p}", f"{DOWNSAMPLE}.projection.{{p}}"),
        ("stages.{i}.downsample.norm.{p}", f"{DOWNSAMPLE}.pre_norm.{{p}}"),
        *blocks("stages.{i}.blocks.{j}.", *BLOCK, *SCALE_MODULES),
        ("head.norm.{p}", "norm.{p}"),
        ("head.fc.{p}", "classifier.{p}"),
    ),
    stores_matrices=lambda mixer: mixer == "attention",
    token_mixers=("pooling", "identity", "separable_conv", "attention"),
)
PREFIXES, BACKBONE_PARTS = ("poolformer", "metaformer"), ("encoder", "hidden_states_norms")
# This package, and transformers' built-in PoolFormer.
TRANSFORMERS = Format(
    name="transformers",
    marker=rf"(?:(?:{'|'.join(PREFIXES)})\.)?encoder\.patch_embeddings\.0\.projection\.",
    rules=(
        *((f"{prefix}.{part}.{{p}}", f"{part}.{{p}}") for prefix in PREFIXES for part in BACKBONE_PARTS),
        ("{p}", "{p}"),
    ),
)

FORMATS = (OFFICIAL_FIRST, OFFICIAL_SECOND, TIMM, TRANSFORMERS)

# 1x1 convolutions of ours that others may store as matrices.
POINTWISE = re.compile(r"encoder\.block\.(\d+)\.\d+\.(?:output\.conv\d|token_mixer\.pwconv\d)\.weight")
