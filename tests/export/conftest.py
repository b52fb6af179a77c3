"""Small saved models of every family, and photographs in folders."""

import pytest
import torch
from digits import all_digits, digits, make_settings, one_thread  # noqa: F401

from hf_poolformer import (
    VARIANTS,
    MetaFormerConfig,
    MetaFormerForImageClassification,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
)
from hf_poolformer.data.photographs import jpegs


SMALL = {"depths": (1, 1, 1, 1), "hidden_sizes": (8, 16, 32, 64), "num_labels": 7}
# The smallest variant of each family.
FAMILIES = {name.rsplit("_", 1)[0]: name for name in VARIANTS if name.endswith(("_s12", "_s18"))}


def small_config(family: str) -> MetaFormerConfig:
    size = {} if family == "poolformer" else {"image_size": 64}
    return MetaFormerConfig.from_variant(FAMILIES[family], **SMALL, **size)


@pytest.fixture(scope="session")
def photos(tmp_path_factory):
    """A folder with 24 photographs, of 90 x 120 pixels."""
    folder = tmp_path_factory.mktemp("photos")
    for index, content in enumerate(jpegs((120, 90), 24)):
        (folder / f"{index:02d}.jpg").write_bytes(content)
    return folder


@pytest.fixture(scope="session")
def save_model(tmp_path_factory):
    """Saves a model with its image processor for 64 x 64 pixels, every parameter far from its initial value."""

    def save(model: torch.nn.Module) -> str:
        generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.rand(parameter.shape, generator=generator) * 0.6 - 0.3)
        folder = tmp_path_factory.mktemp("model")
        model.eval().save_pretrained(folder)
        square = {"height": 64, "width": 64}
        PoolFormerImageProcessor(size={"shortest_edge": 64}, crop_size=square, crop_pct=0.9).save_pretrained(folder)
        return str(folder)

    return save


@pytest.fixture(scope="session")
def small_model(save_model):
    """Folder of a small model of a family, made once."""
    made = {}

    def folder(family: str = "poolformer") -> str:
        if family not in made:
            torch.manual_seed(0)
            config = small_config(family)
            kind = (
                PoolFormerForImageClassification
                if isinstance(config, PoolFormerConfig)
                else MetaFormerForImageClassification
            )
            made[family] = save_model(kind(config))
        return made[family]

    return folder
