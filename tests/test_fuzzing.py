"""Damaged and hostile bytes into every reader: each either works or says in one line what is wrong.

A few hundred inputs of each kind by default, ten thousand in the slow run. No input may end the process, take more
than seconds of processor time, or ask for gigabytes.
"""

import contextlib
import copy
import io
import json
import pickle
import resource
import time
import warnings

import numpy as np
import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import save
from transformers import AutoConfig
from transformers.utils import logging

from hf_poolformer import (
    MetaFormerConfig,
    PoolFormerConfig,
    PoolFormerForImageClassification,
    PoolFormerImageProcessor,
    PoolFormerImageProcessorPil,
)
from hf_poolformer.conversion.convert import ConversionError, read_checkpoint
from hf_poolformer.data.decoding import BrokenImage, decode_image


# Minutes for ten thousand inputs, more on a machine that does something else.
pytestmark = pytest.mark.timeout(3600)

COUNTS = [pytest.param(200, id="few"), pytest.param(10_000, id="ten thousand", marks=pytest.mark.slow)]
MEMORY = 3 << 30  # bytes of address space beyond what the process has; Pillow's own limit is 179 megapixels
SECONDS = 20  # of processor time; an input takes milliseconds


def fuzz(count, strategy, check):
    """Calls `check` with `count` values, the same ones each time."""

    @settings(
        max_examples=count, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(strategy)
    def run(value):
        with guarded():
            check(value)

    run()


@contextlib.contextmanager
def guarded():
    """Fails for giant allocations and for what takes too long."""
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    with open("/proc/self/statm") as file:
        now = int(file.read().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (now + MEMORY, hard))
    start = time.process_time()
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
    assert time.process_time() - start < SECONDS


@pytest.fixture(autouse=True)
def quiet():
    """Warnings about odd values are welcome, ten thousand of them are not."""
    before = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
    logging.set_verbosity(before)


def readable(error: BaseException, lines: int = 1) -> bool:
    text = str(error)
    return 0 < len(text) < 2000 and len(text.strip().splitlines()) <= lines


INTERESTING = [
    b"\0" * 4,
    b"\xff" * 4,
    b"\xff\xff\xff\x7f",
    b"\x7f\xff\xff\xff",
    b"\0\0\0\x01",
    b"\x01\0\0\0",
    b"\0\xff",
]


@st.composite
def mutated(draw, seeds):
    """One of the seeds with up to six bytes or stretches changed, cut, inserted, repeated or taken from another."""
    data = bytearray(draw(st.sampled_from(seeds)))
    for _ in range(draw(st.integers(1, 6))):
        at = draw(st.integers(0, len(data)))
        length = draw(st.integers(1, 64))
        match draw(st.sampled_from(["byte", "word", "cut", "end", "insert", "repeat", "other"])):
            case "byte":
                data[at : at + 1] = bytes([draw(st.integers(0, 255))])
            case "word":
                word = draw(st.sampled_from(INTERESTING))
                data[at : at + len(word)] = word
            case "cut":
                del data[at : at + length]
            case "end":
                del data[at:]
            case "insert":
                data[at:at] = draw(st.binary(max_size=16))
            case "repeat":
                data[at:at] = data[at : at + length]
            case "other":
                other = draw(st.sampled_from(seeds))
                data[at:] = other[at:]
    return bytes(data)


# Images --------------------------------------------------------------------------------------------------------------


def image_seeds():
    noise = np.random.default_rng(0).integers(0, 256, (20, 24, 3), dtype=np.uint8)
    photograph = Image.fromarray(noise)
    exif = Image.Exif()
    exif[0x0112] = 6
    frames = [photograph, photograph.transpose(Image.Transpose.ROTATE_180)]
    kinds = [
        (photograph, {"format": "PNG"}),
        (photograph.convert("P"), {"format": "PNG", "transparency": bytes(range(256))}),
        (Image.fromarray(noise[..., 0].astype(np.uint16) * 257), {"format": "PNG"}),
        (photograph, {"format": "JPEG", "exif": exif}),
        (photograph.convert("CMYK"), {"format": "JPEG"}),
        (photograph, {"format": "JPEG", "progressive": True}),
        (photograph, {"format": "GIF", "save_all": True, "append_images": frames}),
        (photograph, {"format": "TIFF", "exif": exif}),
        (photograph, {"format": "TIFF", "compression": "tiff_lzw"}),
        (photograph, {"format": "WEBP"}),
        (photograph, {"format": "WEBP", "lossless": True}),
        (photograph, {"format": "BMP"}),
        (photograph, {"format": "PPM"}),
        (photograph, {"format": "PCX"}),
        (photograph, {"format": "TGA", "compression": "tga_rle"}),
        (photograph, {"format": "JPEG2000"}),
        (photograph, {"format": "AVIF"}),
        (photograph.convert("L"), {"format": "SGI"}),
    ]
    seeds = []
    for image, how in kinds:
        buffer = io.BytesIO()
        try:
            image.save(buffer, **how)
        except (OSError, KeyError):  # a Pillow without that format
            continue
        seeds.append(buffer.getvalue())
    return seeds


@pytest.mark.parametrize("count", COUNTS)
def test_images(count):
    size = {"size": {"shortest_edge": 32}, "crop_size": {"height": 32, "width": 32}}
    processors = [PoolFormerImageProcessor(**size), PoolFormerImageProcessorPil(**size)]
    outcomes = {"decoded": 0, "broken": 0}

    def check(data):
        try:
            image = decode_image(data)
        except BrokenImage as error:
            assert readable(error) and "memory" not in str(error)
            outcomes["broken"] += 1
            return
        assert image.mode == "RGB" and min(image.size) > 0
        outcomes["decoded"] += 1
        for processor in processors:
            pixels = processor(image, return_tensors="pt")["pixel_values"]
            assert pixels.shape == (1, 3, 32, 32) and bool(pixels.isfinite().all())

    fuzz(count, mutated(image_seeds()), check)
    # Both ways out were taken often, or nothing was tested.
    assert min(outcomes.values()) > count / 20, outcomes


# Configurations ------------------------------------------------------------------------------------------------------

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(-3, 40)
    | st.just(10**12)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(
        ["gelu", "group_norm", "pooling", "attention", "linear", "float16", "poolformer", "nan", "../.."]
    ),
    lambda children: st.lists(children, max_size=5) | st.dictionaries(st.text(max_size=8), children, max_size=4),
    max_leaves=8,
)
CONFIGS = [
    PoolFormerConfig(num_labels=3).to_dict(),
    MetaFormerConfig(num_labels=3, token_mixers=["pooling", "attention", "random", "separable_conv"]).to_dict(),
    MetaFormerConfig.from_variant("caformer_s18", num_labels=3).to_dict(),
]
EXTRA_KEYS = [
    "id2label",
    "label2id",
    "num_labels",
    "auto_map",
    "torch_dtype",
    "dtype",
    "out_indices",
    "out_features",
    "architectures",
    "problem_type",
    "quantization_config",
    "layer_norm_eps",
    "image_size",
    "stage_names",
    "_name_or_path",
    "transformers_version",
    "model_type",
    "output_hidden_states",
    "return_dict",
]
CONFIG_ERRORS = (ValueError, OSError, StrictDataclassError)


@st.composite
def configurations(draw):
    """A configuration with up to four fields of another value or type, left out, or unheard of."""
    config = copy.deepcopy(draw(st.sampled_from(CONFIGS)))
    for _ in range(draw(st.integers(1, 4))):
        key = draw(st.sampled_from([*config, *EXTRA_KEYS]))
        match draw(st.sampled_from(["value", "element", "missing", "stray"])):
            case "value":
                config[key] = draw(JSON_VALUES)
            case "element" if isinstance(config.get(key), (list, tuple)) and config[key]:
                changed = list(config[key])
                changed[draw(st.integers(0, len(changed) - 1))] = draw(JSON_VALUES)
                config[key] = changed
            case "missing":
                config.pop(key, None)
            case _:
                config[draw(st.text(max_size=12))] = draw(JSON_VALUES)
    return config


@pytest.mark.parametrize("count", COUNTS)
def test_configurations(count, tmp_path):
    outcomes = {"read": 0, "refused": 0}

    def check(values):
        (tmp_path / "config.json").write_text(json.dumps(values))
        kind = MetaFormerConfig if values.get("model_type") == "metaformer" else PoolFormerConfig
        for read in (lambda: AutoConfig.from_pretrained(tmp_path), lambda: kind.from_dict(copy.deepcopy(values))):
            try:
                config = read()
            except CONFIG_ERRORS as error:
                assert readable(error, lines=12), repr(error)
                outcomes["refused"] += 1
                continue
            except (TypeError, AttributeError):
                # What transformers itself looks at, before it knows whose the configuration is.
                assert not isinstance(values.get("model_type", ""), str) or "auto_map" in values
                continue
            outcomes["read"] += 1
            # What was accepted can be written, and read again as far as transformers' own fields allow: it writes down
            # the dtype 0 as "0", which it then does not know.
            text = config.to_json_string()
            try:
                assert type(config).from_dict(json.loads(text)).to_json_string() == text
            except CONFIG_ERRORS as error:
                assert readable(error, lines=12), repr(error)

    fuzz(count, configurations(), check)
    assert min(outcomes.values()) > count / 20, outcomes


@pytest.mark.parametrize("count", COUNTS)
def test_bytes_of_config_files(count, tmp_path):
    seeds = [json.dumps(config).encode() for config in CONFIGS]

    def check(data):
        (tmp_path / "config.json").write_bytes(data)
        try:
            AutoConfig.from_pretrained(tmp_path)
        except CONFIG_ERRORS as error:
            assert readable(error, lines=12), repr(error)
        except (TypeError, AttributeError):  # not of ours: transformers takes any JSON for an object
            assert not isinstance(json.loads(data), dict)

    fuzz(count, mutated(seeds), check)


# Weights -------------------------------------------------------------------------------------------------------------


def checkpoint_seeds():
    torch.manual_seed(0)
    config = PoolFormerConfig(depths=(1, 1, 1, 1), hidden_sizes=(2, 2, 2, 2), num_labels=3)
    state = PoolFormerForImageClassification(config).state_dict()
    zipped, legacy, plain = io.BytesIO(), io.BytesIO(), io.BytesIO()
    torch.save({"state_dict": state}, zipped)
    torch.save(state, legacy, _use_new_zipfile_serialization=False)
    pickle.dump({"state_dict": {name: tensor.numpy() for name, tensor in state.items()}}, plain)
    return {
        "safetensors": [save(state, metadata={"format": "pt"})],
        "pth": [zipped.getvalue(), legacy.getvalue(), plain.getvalue()],
    }


@pytest.mark.parametrize("suffix", ["safetensors", "pth"])
@pytest.mark.parametrize("count", COUNTS)
def test_checkpoints_to_convert(count, suffix, tmp_path):
    path = tmp_path / f"poolformer.{suffix}"
    outcomes = {"read": 0, "refused": 0}

    def check(data):
        path.write_bytes(data)
        try:
            checkpoint = read_checkpoint(path)
        except ConversionError as error:
            assert readable(error), repr(error)
            outcomes["refused"] += 1
            return
        outcomes["read"] += 1
        assert all(bool(tensor.isfinite().all()) for tensor in checkpoint.tensors.values())

    fuzz(count, mutated(checkpoint_seeds()[suffix]), check)
    assert outcomes["refused"] > count / 5 and outcomes["read"], outcomes
