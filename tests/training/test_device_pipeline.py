"""The device's part of the pipeline against the workers' part, on the CPU, where both can run."""

import dataclasses
import io

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.decoding import BrokenImage, EncodedImage, decode_image
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import device_pipeline
from hf_poolformer.training.augmentation import Box, Draws, TrainTransform
from hf_poolformer.training.device_pipeline import (
    CropBatches,
    DevicePipeline,
    EncodedTransform,
    TrainingBatches,
    decode_upright,
    make_pipeline,
    portions,
    upright,
)
from hf_poolformer.training.loop import train


CPU = torch.device("cpu")
SIDE = 48


def photograph(height, width, seed=0):
    """Soft shapes with some fine noise, like a photograph and unlike noise."""
    generator = np.random.default_rng(seed)
    coarse = generator.integers(0, 256, (6, 6, 3), dtype=np.uint8)
    soft = np.asarray(Image.fromarray(coarse).resize((width, height), Image.BICUBIC), dtype=float)
    return Image.fromarray((0.9 * soft + generator.uniform(0, 25, soft.shape)).astype(np.uint8))


def encode(image, kind="JPEG", **options):
    buffer = io.BytesIO()
    image.save(buffer, kind, **({"quality": 95, **options} if kind == "JPEG" else options))
    return buffer.getvalue()


def as_tensor(image):
    return torch.from_numpy(np.array(image)).permute(2, 0, 1)


def as_bytes(data):
    return torch.frombuffer(bytearray(data), dtype=torch.uint8)


@pytest.fixture
def processor():
    return PoolFormerImageProcessor(
        size={"shortest_edge": SIDE}, crop_size={"height": SIDE, "width": SIDE}, crop_pct=1.0
    )


def settings(**changes):
    return TrainingSettings.from_recipe("paper", train_dir="x", output_dir="y", **changes)


def batch_of(transform, sources, kind=CropBatches):
    """What a worker would deliver, with labels 0, 1, 2, ..., and seeds 0, 1, 2, ... of the draws."""
    loaded = []
    for seed, source in enumerate(sources):
        torch.manual_seed(seed)
        with EncodedImage(source) as image:
            loaded.append(transform.load(image))
    batches = object.__new__(kind)
    batches._transform, batches._dataset = transform, type("Dataset", (), {"problem_type": "single_label"})
    return {**batches._batch(loaded, list(range(len(sources)))), "skipped": [], "seen": len(sources)}


@pytest.mark.parametrize("recipe", ["finetune", "paper", "demo"])
def test_the_device_makes_the_workers_examples(processor, recipe):
    """Same draws, same examples, whether one by one in a worker or as a batch."""
    given = TrainingSettings.from_recipe(recipe, train_dir="x", output_dir="y", random_erasing=0.5)
    transform = TrainTransform(given, processor)
    images = [encode(photograph(90, 120, seed)) for seed in range(24)]
    expected = []
    for seed, data in enumerate(images):
        torch.manual_seed(seed)
        expected.append(transform(decode_image(data)))
    by_worker = batch_of(transform, images, TrainingBatches)["pixel_values"]
    by_device = DevicePipeline(transform, CPU)(batch_of(transform, images))["pixel_values"]
    for result in (by_worker, by_device):
        assert result.dtype == torch.float32 and result.shape == (24, 3, SIDE, SIDE)
        assert result.is_contiguous(memory_format=torch.channels_last)
        # Sums over a batch may be taken in another order, and a rounding go the other way.
        changed = (torch.stack(expected) - result).abs() > 1e-5
        assert changed.float().mean() < 1e-3


def test_noise_is_where_and_what_it_is_in_the_workers(processor):
    transform = TrainTransform(settings(), processor)
    crops = torch.full((40, 3, SIDE, SIDE), 120, dtype=torch.uint8)
    box = Box(5, 9, 20, 30)
    draws = [Draws(erased=box if index % 2 else None, noise=index) for index in range(40)]
    state = torch.get_rng_state()
    result = transform.normalise(crops, draws)
    changed = (result != transform.normalise(crops, [Draws()] * 40)).any(1)
    inside = torch.zeros(SIDE, SIDE, dtype=torch.bool)
    inside[5:25, 9:39] = True
    assert not changed[0::2].any() and (changed[1::2] == inside).all()
    noise = result[1::2][:, :, 5:25, 9:39]
    assert abs(noise.mean()) < 0.02 and abs(noise.std() - 1) < 0.02
    assert not torch.equal(noise[0], noise[1])
    # Its seed was drawn with the rest: the global generator has no part in it, nor have the other images.
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(transform.normalise(crops[:2], draws[7:9])[0], result[7])


def test_decoding_on_the_device_makes_the_workers_examples(processor):
    """JPEGs in all orientations, grey, progressive; CMYK and PNG come as crops."""
    sources = []
    for orientation in range(1, 9):
        exif = Image.Exif()
        exif[0x0112] = orientation
        sources.append(encode(photograph(90, 120, orientation), exif=exif))
    sources.append(encode(photograph(70, 80).convert("L")))
    sources.append(encode(photograph(70, 80), progressive=True))
    sources.append(encode(photograph(70, 80).convert("CMYK")))
    sources.append(encode(photograph(70, 80), "PNG"))
    given = settings(reduced_decoding=False)
    by_crop = DevicePipeline(TrainTransform(given, processor), CPU)(
        batch_of(TrainTransform(given, processor), sources)
    )
    message = batch_of(EncodedTransform(given, processor), sources)
    assert [example.bytes > 0 for example in message["examples"]] == [True] * 10 + [False] * 2
    result = DevicePipeline(EncodedTransform(given, processor), CPU)(message)
    assert result["labels"].tolist() == list(range(12)) and result["skipped"] == []
    assert "encoded" not in result and "examples" not in result
    torch.testing.assert_close(result["pixel_values"], by_crop["pixel_values"])


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(10, 14), "PNG", exif=exif)
    stored = Image.open(io.BytesIO(data))
    assert torch.equal(upright(as_tensor(stored), orientation), as_tensor(ImageOps.exif_transpose(stored)))


def test_what_the_device_cannot_read_is_read_by_pillow_or_skipped(processor, monkeypatch):
    good = [encode(photograph(60, 70, seed)) for seed in range(6)]
    odd = good[2]  # Pillow reads it, "the device" does not
    broken = bytearray(encode(photograph(60, 70, 9)))
    table = broken.index(b"\xff\xc4")  # a Huffman table; header and end are fine
    broken[table + 5 : table + 21] = b"\xff" * 16
    decode, batches = device_pipeline.decode_jpegs, []

    def decode_jpegs(encoded, device):
        batches.append(len(encoded))
        if any(bytes(data.numpy()) in (odd, bytes(broken)) for data in encoded):
            raise RuntimeError("nvjpegDecode failed: 5")
        return decode(encoded, device)

    monkeypatch.setattr(device_pipeline, "decode_jpegs", decode_jpegs)
    transform = EncodedTransform(settings(), processor)
    message = batch_of(transform, [*good, bytes(broken)])
    examples, lengths = message["examples"], [example.bytes for example in message["examples"]]
    images = decode_upright(message["encoded"].split(lengths), [1] * 7, CPU)
    assert torch.equal(images[2], as_tensor(Image.open(io.BytesIO(odd))))
    assert isinstance(images[6], BrokenImage) and all(image.shape == (3, 60, 70) for image in images[:6])
    assert batches[0] == 7 and len(batches) == 11  # by halving: two paths through a tree with seven leaves
    result = DevicePipeline(transform, CPU)({**message, "skipped": ["a.jpg: torn"]})
    assert result["labels"].tolist() == [0, 1, 2, 3, 4, 5] and len(result["pixel_values"]) == 6
    assert result["skipped"][0] == "a.jpg: torn" and result["skipped"][1].startswith("an image without a name: ")
    assert result["seen"] == 7 and len(examples) == 7
    alone = DevicePipeline(transform, CPU)(batch_of(transform, [bytes(broken)]))
    assert "labels" not in alone and "pixel_values" not in alone and len(alone["skipped"]) == 1


def test_running_out_of_memory_is_no_fault_of_the_image(monkeypatch):
    def decode_jpegs(encoded, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(device_pipeline, "decode_jpegs", decode_jpegs)
    with pytest.raises(torch.OutOfMemoryError):
        decode_upright([as_bytes(encode(photograph(20, 20)))] * 2, [1, 1], CPU)


def test_portions():
    assert list(portions([], 10)) == []
    assert list(portions([4, 4, 4, 20, 1, 9, 1], 10)) == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decodes")
def test_decoding_needs_cuda(processor):
    with pytest.raises(UserError, match="decode needs a CUDA GPU, and this run is on cpu"):
        make_pipeline(settings(device_preprocessing="decode"), processor, CPU)


def test_a_run_that_augments_on_the_device(make_settings, tmp_path):
    """Every augmentation, from the workers through the loader to the model; stopped and resumed, bit by bit."""
    run = make_settings(
        crop_min_scale=0.5,
        horizontal_flip=0.5,
        rand_augment_magnitude=9.0,
        random_erasing=0.5,
        mixup_alpha=0.8,
        device_preprocessing="augment",
        num_workers=1,
        max_train_steps=12,  # an epoch has 10
        checkpointing_steps="6",
        save_total_limit=0,
    )
    whole = train(run)
    assert whole["step"] == 12 and whole["skipped_images"] == 0
    step = str(tmp_path / "run/checkpoints/step-6")
    train(dataclasses.replace(run, output_dir=str(tmp_path / "resumed"), resume_from_checkpoint=step))
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "resumed"))
    assert first == second


@pytest.mark.gpu
def test_decoding_on_a_gpu(processor):
    """nvJPEG's pixels differ from libjpeg's by its inverse DCT and chroma upsampling: a few levels."""
    device = torch.device("cuda")
    given = settings(reduced_decoding=False, rand_augment_magnitude=0.0, random_erasing=0.0)
    sources = [encode(photograph(90, 120, seed), subsampling=0) for seed in range(16)]
    sources += [encode(photograph(70, 80).convert("L")), encode(photograph(70, 80), progressive=True)]
    made = make_pipeline(settings(device_preprocessing="decode"), processor, device)
    assert isinstance(made["transform"], EncodedTransform) and made["finish"].device == device
    results = []
    for kind, where in ((TrainTransform, CPU), (EncodedTransform, device)):
        results.append(DevicePipeline(kind(given, processor), where)(batch_of(kind(given, processor), sources)))
    first, second = (result["pixel_values"].cpu() for result in results)
    assert (first - second).abs().mean() * 255 * 0.226 < 3
    truncated = as_bytes(sources[0][: len(sources[0]) // 2])
    assert len(decode_upright([truncated, as_bytes(sources[1])], [1, 1], device)) == 2
