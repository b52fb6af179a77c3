"""The device's part of the pipeline against the workers' part, on the CPU, where both can run."""

import dataclasses
import io
import json
import multiprocessing
import os
import random
import re
import socket
import sys
import types

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import DynamoBackend
from PIL import Image, ImageOps
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from hf_poolformer import PoolFormerImageProcessor
from hf_poolformer.data.datasets import open_datasets
from hf_poolformer.data.decoding import BrokenImage, EncodedImage, decode_image
from hf_poolformer.data.loader import make_loader
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.settings.training import TrainingSettings
from hf_poolformer.training import augmentation, device_choice, images, jpeg_decoders
from hf_poolformer.training.augmentation import Box, Draws, ExampleHeader, TrainTransform, part_of
from hf_poolformer.training.device_choice import Rates, choose, possible_ways
from hf_poolformer.training.device_pipeline import (
    AugmentedBatches,
    BatchMemory,
    CropBatches,
    DevicePipeline,
    EncodedTransform,
    Preprocessing,
    make_pipeline,
)
from hf_poolformer.training.jpeg_decoders import decode_upright, upright
from hf_poolformer.training.loop import train
from hf_poolformer.training.resampling import portions
from hf_poolformer.training.task import training_of


CPU = torch.device("cpu")
SIDE = 48
NO, AUGMENT = Preprocessing("no"), Preprocessing("augment")
DECODE = Preprocessing("decode", "torchvision")


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
    batches = object.__new__(kind)
    batches._transform, batches.batch_size = transform, len(sources)
    loaded = []
    for seed, source in enumerate(sources):
        random.seed(seed)
        torch.manual_seed(seed)
        loaded.append(batches._example(EncodedImage(source), seed))
    return {**batches._batch(*map(list, zip(*loaded, strict=True))), "skipped": [], "seen": len(sources)}


@pytest.mark.parametrize("recipe", ["finetune", "paper", "demo"])
def test_the_device_makes_the_workers_examples(processor, recipe):
    """Same draws, same examples, whether one by one in a worker or as a batch."""
    given = TrainingSettings.from_recipe(recipe, train_dir="x", output_dir="y", random_erasing=0.5)
    transform = TrainTransform(given, processor)
    images = [encode(photograph(90, 120, seed)) for seed in range(24)]
    expected = []
    for seed, data in enumerate(images):
        random.seed(seed)
        torch.manual_seed(seed)
        expected.append(transform(decode_image(data)))
    by_worker = DevicePipeline(transform, CPU, NO)(batch_of(transform, images, AugmentedBatches))["pixel_values"]
    by_device = DevicePipeline(transform, CPU, AUGMENT)(batch_of(transform, images))["pixel_values"]
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
    by_crop = DevicePipeline(TrainTransform(given, processor), CPU, AUGMENT)(
        batch_of(TrainTransform(given, processor), sources)
    )
    pipeline = DevicePipeline(EncodedTransform(given, processor), CPU, DECODE)
    result = pipeline(batch_of(EncodedTransform(given, processor), sources))
    assert (pipeline.images, pipeline.decoded_by_cpu) == (12, 2)
    assert result["labels"].tolist() == list(range(12)) and result["skipped"] == []
    assert "content" not in result and "examples" not in result
    torch.testing.assert_close(result["pixel_values"], by_crop["pixel_values"])


class Launches(TorchDispatchMode):
    """Counts what would be kernels on a device, all but views, and keeps the most bytes that one of them gives."""

    count = largest = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if not func.is_view and "view" not in func.name():
            self.count += 1
            self.largest = max([self.largest, *(x.nbytes for x in tree_leaves(result) if isinstance(x, torch.Tensor))])
        return result


@pytest.mark.parametrize("crop_min_scale", [0.3, 1.0])
@pytest.mark.parametrize("number", [24, 60], ids=["few", "many"])
def test_crops_of_a_batch_on_a_device(processor, crop_min_scale, number):
    """As a GPU has them, in floats: the pixels that torchvision makes of each alone."""
    transform = TrainTransform(settings(crop_min_scale=crop_min_scale), processor)
    random.seed(0)
    sizes = [(SIDE, SIDE), (60, 200), (90, 51), *([(90, 120)] * (number - 3))]
    images = [as_tensor(photograph(*size, seed)).contiguous() for seed, size in enumerate(sizes)]
    draws = [transform.draw(*size) for size in sizes]
    with Launches() as launches:
        result = transform.resize_floats(images, draws)
    assert result.dtype == torch.uint8 and result.shape == (number, 3, SIDE, SIDE)
    assert launches.count <= (4 * number if number < 32 and crop_min_scale == 1 else 61)
    changed = 0
    for image, one, resized in zip(images, draws, result, strict=True):
        crop = part_of(image, one)
        difference = (transform.resize(crop.float(), one).round() - resized).abs()
        assert difference.max() <= 1
        changed += int(difference.sum())
        # PyTorch's arithmetic on 8 bits has weights of 8 bits or so.
        assert (transform.resize(crop, one).int() - resized).abs().max() <= 1
    # One by one it is the same arithmetic; together sums are taken in another order, which only moves what is half way
    # between two levels.
    assert changed <= (0 if number < 32 else 1e-4 * result.numel())


def test_crops_take_bounded_memory(processor, monkeypatch):
    """What does not fit into the limit is done in pieces, and what is larger than it alone."""
    transform = TrainTransform(settings(), processor)
    random.seed(0)
    sizes = [(90, 120)] * 100 + [(600, 900)] + [(90, 120)] * 4
    images = [as_tensor(photograph(*size, seed)).contiguous() for seed, size in enumerate(sizes)]
    draws = [transform.draw(*size) for size in sizes]
    draws[100] = dataclasses.replace(draws[100], crop=Box(0, 0, 600, 900))
    whole = transform.resize_floats(images, draws)
    monkeypatch.setattr(augmentation, "MAX_PIXELS", limit := 1 << 19)
    with Launches() as launches:
        pieces = transform.resize_floats(images, draws)
    assert launches.largest == 600 * 900 * 3 * 4
    assert (pieces.int() - whole).abs().max() <= 1
    with Launches() as launches:
        transform.resize_floats(images[:100], draws[:100])
    assert launches.largest <= limit * 3 * 4


def test_jpegs_of_a_whole_batch_as_a_device_crops_them(processor, monkeypatch):
    """The workers' examples up to a level of 255, each in its place, with what came as a crop and what is broken."""
    sources = []
    for index in range(44):
        exif = Image.Exif()
        exif[0x0112] = index % 8 + 1
        sources.append(encode(photograph(60 + index, 120 - index, index), exif=exif))
    broken = bytearray(sources[7])
    table = broken.index(b"\xff\xc4")  # a Huffman table; header and end are fine
    broken[table + 5 : table + 21] = b"\xff" * 16
    sources[7], sources[20] = bytes(broken), encode(photograph(70, 80), "PNG")
    given = settings(reduced_decoding=False, rand_augment_magnitude=0.0, random_erasing=0.5)
    transform, ways = EncodedTransform(given, processor), ("resize_together", "resize_few", "resize_floats")
    results = []
    for way in ways:
        monkeypatch.setattr(TrainTransform, "resize_together", getattr(TrainTransform, way))
        results.append(DevicePipeline(transform, CPU, DECODE)(batch_of(transform, sources)))
        assert results[-1]["labels"].tolist() == [*range(7), *range(8, 44)] and len(results[-1]["skipped"]) == 1
    by_worker, one_by_one, together = (result["pixel_values"] for result in results)
    level = 255 * torch.tensor(processor.image_std)[:, None, None]
    # Floats are rounded once, 8 bits after either axis.
    assert ((together - by_worker).abs() * level).max() < 1.01
    assert ((together - one_by_one).abs() * level).mean() < 1e-3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright(orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    data = encode(photograph(10, 14), "PNG", exif=exif)
    stored = Image.open(io.BytesIO(data))
    assert torch.equal(upright(as_tensor(stored), orientation), as_tensor(ImageOps.exif_transpose(stored)))


def use_decoder(monkeypatch, decode):
    """Puts a function in the place of the decoder `torchvision`."""
    monkeypatch.setitem(jpeg_decoders.DECODERS, "torchvision", decode)


def test_what_the_device_cannot_read_is_read_by_pillow_or_skipped(processor, monkeypatch):
    good = [encode(photograph(60, 70, seed)) for seed in range(6)]
    odd = good[2]  # Pillow reads it, "the device" does not
    broken = bytearray(encode(photograph(60, 70, 9)))
    table = broken.index(b"\xff\xc4")  # a Huffman table; header and end are fine
    broken[table + 5 : table + 21] = b"\xff" * 16
    decode, batches = jpeg_decoders.by_torchvision, []

    def decode_jpegs(encoded, orientations, device):
        batches.append(len(encoded))
        if any(bytes(data.numpy()) in (odd, bytes(broken)) for data in encoded):
            raise RuntimeError("nvjpegDecode failed: 5")
        images = decode(encoded, orientations, device)
        # One decoder turns an image that the header does not: what was drawn would not fit.
        turned = [bytes(data.numpy()) == good[4] for data in encoded]
        return [image.mT if turns else image for image, turns in zip(images, turned, strict=True)]

    use_decoder(monkeypatch, decode_jpegs)
    headers = [ExampleHeader(Draws(), bytes=1, height=60, width=70)] * 7
    images, by_pillow = decode_upright("torchvision", [as_bytes(x) for x in (*good, broken)], headers, CPU)
    for index in (2, 4):
        assert torch.equal(images[index], as_tensor(Image.open(io.BytesIO(good[index]))))
    assert isinstance(images[6], BrokenImage) and all(image.shape == (3, 60, 70) for image in images[:6])
    assert batches[0] == 7 and len(batches) == 11  # by halving: two paths through a tree with seven leaves
    assert by_pillow == 3
    transform = EncodedTransform(settings(), processor)
    message = batch_of(transform, [*good, bytes(broken)])
    pipeline = DevicePipeline(transform, CPU, DECODE)
    result = pipeline({**message, "skipped": ["a.jpg: torn"]})
    assert result["labels"].tolist() == [0, 1, 2, 3, 4, 5] and len(result["pixel_values"]) == 6
    assert result["skipped"][0] == "a.jpg: torn" and result["skipped"][1].startswith("an image without a name: ")
    assert result["seen"] == 7 and (pipeline.images, pipeline.decoded_by_cpu) == (7, 3)
    alone = pipeline(batch_of(transform, [bytes(broken)]))
    assert "labels" not in alone and "pixel_values" not in alone and len(alone["skipped"]) == 1


@pytest.mark.parametrize("preprocessing", [NO, AUGMENT, DECODE], ids=lambda way: way.mode)
@pytest.mark.parametrize("problem_type", ["multi_label_classification", "regression"])
def test_several_labels_and_numbers_stay_with_their_images(tmp_path, processor, problem_type, preprocessing):
    levels = range(0, 240, 10)
    grey = [encode(Image.new("RGB", (60, 60), (level,) * 3)) for level in levels]
    grey[5], torn = b"no image", bytearray(grey[9])
    table = torn.index(b"\xff\xc4")  # found when it is decoded, by the device say
    torn[table + 5 : table + 21] = b"\xff" * 16
    grey[9] = bytes(torn)
    labels = [[name for name in "ab" if level % (20 if name == "a" else 30) == 0] for level in levels]
    if problem_type == "regression":
        labels = [[level / 3, -level] for level in levels]
    pq.write_table(pa.table({"image": grey, "label": labels}), tmp_path / "data.parquet")
    dataset = open_datasets(dataset_name=tmp_path, train_val_split=0, problem_type=problem_type)["train"]
    given = settings(rand_augment_magnitude=0.0, random_erasing=0.0)
    loader = make_loader(
        dataset,
        batch_size=8,
        training=True,
        drop_last=False,
        max_skipped=2,
        **make_pipeline(given, processor, CPU, preprocessing),
    )
    found = list(loader)
    assert sum(len(batch["skipped"]) for batch in found) == 2
    seen = []
    for batch in found:
        assert batch["labels"].dtype == torch.float32 and batch["labels"].shape == (len(batch["pixel_values"]), 2)
        pixels = batch["pixel_values"][:, 0].mean((1, 2)) * processor.image_std[0] + processor.image_mean[0]
        for level, label in zip((pixels * 25.5).round().int().tolist(), batch["labels"].tolist(), strict=True):
            seen.append(10 * level)
            expected = (
                labels[level] if problem_type == "regression" else [float(name in labels[level]) for name in "ab"]
            )
            assert label == pytest.approx(expected, rel=1e-6)
    assert sorted(seen) == [level for level in levels if level not in (50, 90)]


def test_running_out_of_memory_is_no_fault_of_the_image(monkeypatch):
    def decode_jpegs(encoded, orientations, device):
        raise torch.OutOfMemoryError("CUDA out of memory")

    use_decoder(monkeypatch, decode_jpegs)
    with pytest.raises(torch.OutOfMemoryError):
        decode_upright("torchvision", [as_bytes(encode(photograph(20, 20)))] * 2, [ExampleHeader(Draws())] * 2, CPU)


def test_a_batch_crosses_in_one_tensor_of_8_bits(make_settings, processor, monkeypatch):
    """What a worker sends, as the main process gets it: in shared memory, with one file descriptor."""
    task = training_of(make_settings(num_workers=1, crop_min_scale=0.5, random_erasing=1.0))
    accelerator = Accelerator(cpu=True)
    task.open_data(accelerator)
    for way in (NO, AUGMENT):
        monkeypatch.setattr(images, "choose_preprocessing", lambda *_, way=way: way)
        loader, _ = task.make_loaders(accelerator, *task.make_model(accelerator, torch.channels_last))
        finish, messages = loader.finish, []
        loader.finish = lambda message, finish=finish, messages=messages: messages.append(message) or finish(message)
        batch = next(iter(loader))
        [content] = [value for value in messages[0].values() if isinstance(value, torch.Tensor)]
        assert content.is_shared() and content.dtype == torch.uint8 and len(content) == 32 * 3 * 32 * 32
        assert batch["pixel_values"].dtype == torch.float32 and len(batch["labels"]) == 32
        assert batch["pixel_values"].std() > 0.5  # normalised, with noise


@pytest.mark.parametrize("side", [SIDE, 224])
def test_batches_that_somebody_keeps_stay_as_they_are(tmp_path, side):
    """Memory is used again, and so are places in a message: neither while somebody holds it, nor after a break."""
    square = {"height": side, "width": side}
    processor = PoolFormerImageProcessor(size={"shortest_edge": side}, crop_size=square)
    data = [encode(photograph(60, 70, seed)) for seed in range(20)]
    data[3] = b"no image"
    pq.write_table(pa.table({"image": data, "label": [0, 1] * 10}), tmp_path / "data.parquet")
    dataset = open_datasets(dataset_name=tmp_path, train_val_split=0)["train"]

    def loader(preprocessing):
        made = make_pipeline(settings(), processor, CPU, preprocessing)
        return make_loader(dataset, batch_size=3, training=True, drop_last=False, max_skipped=1, **made)

    for preprocessing in (NO, AUGMENT):
        fresh = loader(preprocessing)
        one_by_one = [batch["pixel_values"].clone() for batch in fresh]
        again = loader(preprocessing)
        next(iter(again))
        kept = [batch["pixel_values"] for batch in again]
        assert len(kept) == len(one_by_one) == 7 and len({batch.data_ptr() for batch in kept}) == 7
        assert all(torch.equal(*pair) for pair in zip(kept, one_by_one, strict=True))


def test_memory_of_batches():
    """Whatever shares it keeps it: views, arrays. What is given back is used again, for batches of about its size."""
    memory = BatchMemory()
    first, second = memory.take((6, 100), torch.float32).fill_(1), memory.take((6, 100), torch.float32).fill_(2)
    place, row, array = first.data_ptr(), first[2], second.numpy()
    del first, second
    third = memory.take((6, 100), torch.float32).fill_(3)
    assert (row == 1).all() and (array == 2).all()
    del row
    fourth = memory.take((5, 100), torch.float32)
    assert fourth.data_ptr() == place and fourth.shape == (5, 100) and (array == 2).all() and (third == 3).all()
    del third
    assert memory.take((60, 100), torch.float32).fill_(5).sum() == 30_000
    many = [memory.take((6, 100), torch.uint8).fill_(level) for level in range(20)]
    assert all((values == level).all() for level, values in enumerate(many)) and len(memory._pieces) <= 4


def test_portions():
    assert list(portions([], 10)) == []
    assert list(portions([4, 4, 4, 20, 1, 9, 1], 10)) == [(0, 2), (2, 3), (3, 4), (4, 6), (6, 7)]


@pytest.mark.parametrize(
    ("worker", "device", "workers", "expected"),
    [(200, 50_000, 15, 3000), (5000, 9800, 15, 9800), (200, 200, 0, 100)],
)
def test_what_is_expected_of_workers_and_device(worker, device, workers, expected):
    assert Rates(worker, device).expected(workers) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("model", "workers", "chosen"),
    [
        (float("inf"), 15, AUGMENT),  # 3000, and 9000
        (1500, 15, NO),  # 1456 for the one, 1286 for the other: the device is busy with the model
        (3400, 15, NO),  # 3000 and 2468
        (9000, 15, AUGMENT),  # 3000 and 4500
        (1500, 4, AUGMENT),  # 800 and 1286: here the workers do not keep up
    ],
)
def test_a_device_that_is_busy_training_gets_no_more_to_do(model, workers, chosen):
    rates = {NO: Rates(200, 50_000, model), AUGMENT: Rates(2000, 9000, model)}
    assert choose({way: rate.expected(workers) for way, rate in rates.items()}) == chosen


def test_how_fast_a_model_trains_alone(make_settings, monkeypatch):
    """Measured on a copy: weights, gradients, statistics and generators stay. What tells nothing is not measured."""
    given = make_settings()
    task, accelerator = training_of(given), Accelerator(cpu=True)
    task.open_data(accelerator)
    model, processor = task.make_model(accelerator, torch.channels_last)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    state = torch.get_rng_state()
    rate = device_choice.training_rate(model, given, processor, accelerator)
    assert 0 < rate < float("inf") and torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
    waiting = torch.nn.Sequential(torch.nn.SyncBatchNorm(3))
    assert device_choice.training_rate(waiting, given, processor, accelerator) == float("inf")
    assert device_choice.training_rate(torch.nn.Conv2d(5, 3, 1), given, processor, accelerator) == float("inf")
    monkeypatch.setattr(accelerator.state.dynamo_plugin, "backend", DynamoBackend.INDUCTOR)
    assert device_choice.training_rate(model, given, processor, accelerator) == float("inf")


def test_the_models_speed_decides(make_settings, monkeypatch, capsys):
    given = make_settings()
    task, accelerator = training_of(given), Accelerator(cpu=True)
    task.open_data(accelerator)
    model, processor = task.make_model(accelerator, torch.channels_last)
    pretend(monkeypatch, NO, AUGMENT)
    monkeypatch.setattr(device_choice, "cores", lambda: 15)
    rates = {NO: Rates(200, 50_000), AUGMENT: Rates(2000, 9000)}
    monkeypatch.setattr(device_choice, "measured_rates", lambda *_: rates)
    monkeypatch.setattr(device_choice, "training_rate", lambda *_: 1500)
    arguments = (given, task.datasets["train"], processor, accelerator, 15)
    assert device_choice.choose_preprocessing(*arguments) == AUGMENT
    assert "(no 3000, augment 9000 images/s expected of 15 workers and this device)" in capsys.readouterr().out
    assert device_choice.choose_preprocessing(*arguments, model=model) == NO
    assert "15 workers and this device, which trains 1500 without them)" in capsys.readouterr().out


BY_CODEC = Preprocessing("decode", "torchcodec")


@pytest.mark.parametrize(
    ("rates", "chosen"),
    [
        ({NO: 3100, AUGMENT: 5200, DECODE: 9800}, DECODE),
        ({NO: 3100, AUGMENT: 9000, DECODE: 9800}, AUGMENT),  # within a fifth: the simpler
        ({NO: 8000, AUGMENT: 9000, DECODE: 9800}, NO),
        ({NO: 7800, AUGMENT: 7700, DECODE: 9800}, DECODE),
        ({NO: 100, AUGMENT: 90, DECODE: 40}, NO),
        ({NO: 100, AUGMENT: 5000, BY_CODEC: 9000, DECODE: 9800}, DECODE),  # of two decoders the faster
        ({NO: 100, AUGMENT: 5000, BY_CODEC: 9800, DECODE: 9800}, BY_CODEC),
        ({BY_CODEC: 9700, DECODE: 9800}, DECODE),
        ({NO: 5}, NO),
    ],
)
def test_the_simplest_way_that_is_fast_enough(rates, chosen):
    assert choose(rates) == chosen


def test_the_ways_that_a_device_has(monkeypatch):
    """`auto` on the CPU is `no`; a GPU that decodes by nothing leaves that way out, and says why."""
    assert possible_ways("auto", CPU) == ([NO], "")
    assert possible_ways("augment", CPU) == ([AUGMENT], "")
    monkeypatch.setattr(device_choice, "working_decoders", lambda device: ([], "torchcodec: not installed"))
    gpu = torch.device("cuda")
    assert possible_ways("auto", gpu) == ([NO, AUGMENT], "torchcodec: not installed")
    monkeypatch.setattr(device_choice, "working_decoders", lambda device: (["torchcodec", "torchvision"], ""))
    assert possible_ways("auto", gpu) == ([NO, AUGMENT, BY_CODEC, DECODE], "")
    assert possible_ways("decode", gpu) == ([BY_CODEC, DECODE], "")


def test_decoders_that_do_not_work_are_left_out(monkeypatch):
    def decode(encoded, orientations, device):
        raise OSError("libnvjpeg.so.13: cannot open shared object file")

    use_decoder(monkeypatch, decode)
    monkeypatch.setitem(sys.modules, "torchcodec", None)
    names, fault = jpeg_decoders.working_decoders(CPU)
    assert names == [] and fault.startswith("torchcodec: ") and "torchvision: libnvjpeg.so.13: cannot" in fault
    # TorchCodec's own reading of EXIF is relied on: nothing is turned twice.
    given, image = [], torch.zeros(3, 4, 6, dtype=torch.uint8)
    codec = types.ModuleType("torchcodec.decoders")
    codec.decode_jpeg = lambda encoded, mode, device: given.append((len(encoded), mode, device)) or [image] * 2
    monkeypatch.setitem(sys.modules, "torchcodec", types.ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", codec)
    assert jpeg_decoders.working_decoders(CPU)[0] == ["torchcodec"]
    images = jpeg_decoders.DECODERS["torchcodec"]((torch.zeros(9, dtype=torch.uint8),) * 2, [6, 1], CPU)
    assert given[1] == (2, "RGB", CPU) and all(torch.equal(one, image) for one in images)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU decodes")
def test_decoding_needs_cuda(make_settings):
    with pytest.raises(UserError, match=r"decode: it needs a CUDA GPU, and this run is on cpu\. Choose auto"):
        train(make_settings(device_preprocessing="decode"))


def pretend(monkeypatch, *ways, fault=""):
    """A CPU that has these ways to preprocess; its decoder is torchvision's, on the CPU."""
    monkeypatch.setattr(device_choice, "possible_ways", lambda mode, device: (list(ways), fault))


def test_auto_measures_chooses_and_keeps_to_it(make_settings, tmp_path, monkeypatch, capfd):
    """Measured on the run's images, said in one line; a resumed run keeps the choice, and is the run it continues."""
    run = make_settings(
        crop_min_scale=0.5,
        random_erasing=0.5,
        rand_augment_magnitude=9.0,
        max_train_steps=4,
        checkpointing_steps="2",
        save_total_limit=0,
    )
    line = r"device_preprocessing auto: (.+) \(no \d+, augment \d+, decode by torchvision \d+ images/s expected of 0 "
    pretend(monkeypatch, NO, AUGMENT, DECODE)
    monkeypatch.setattr(device_choice, "choose", lambda expected: DECODE)
    train(run)
    line += r"workers and this device, which trains \d+ without them\)"
    assert re.search(line, capfd.readouterr().out)[1] == "decode by torchvision"
    step = tmp_path / "run/checkpoints/step-2"
    progress = json.loads((step / "progress.json").read_text())
    assert progress["choices"] == {"device_preprocessing": ["decode", "torchvision"]}
    assert "device_preprocessing: auto" in (tmp_path / "run/training_settings.yaml").read_text()

    def resumed(name, **changes):
        again = {"output_dir": str(tmp_path / name), "resume_from_checkpoint": str(step), **changes}
        results = train(dataclasses.replace(run, **again))
        return results, capfd.readouterr().out

    # As it was, without measuring.
    monkeypatch.setattr(device_choice, "measured_rates", None)
    results, said = resumed("resumed")
    assert "device_preprocessing" not in said
    first, second = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("run", "resumed"))
    assert first == second
    # The digits are PNGs: in the line at the end, and in the results.
    assert results["images_decoded_by_cpu"] >= 64
    assert f"{results['images_decoded_by_cpu']} images were decoded by the CPU, which the device could not" in said
    # What is asked for wins.
    pretend(monkeypatch, AUGMENT)
    _, said = resumed("asked", device_preprocessing="augment")
    assert "the run had --device_preprocessing decode by torchvision, this start of it says augment." in said
    # What a machine cannot do is not kept; a measurement that fails is none.
    pretend(monkeypatch, NO, AUGMENT, fault="torchvision: no nvJPEG")
    results, said = resumed("elsewhere")
    assert "the run had --device_preprocessing decode by torchvision, which is not possible here." in said
    assert "images_decoded_by_cpu" not in results


def test_a_measurement_that_fails_is_a_warning(make_settings, monkeypatch, caplog):
    def fail(*_):
        raise torch.OutOfMemoryError("CUDA out of memory")

    pretend(monkeypatch, NO, AUGMENT)
    monkeypatch.setattr(device_choice, "measured_rates", fail)
    assert train(make_settings(max_train_steps=1))["step"] == 1
    assert "--device_preprocessing auto: measuring failed (CUDA out of memory), so it is no." in caplog.text


def test_measuring_changes_nothing_else(make_settings, monkeypatch, capsys):
    """Neither the random generators nor the threads; what it leaves out, it gives a reason for."""
    given = make_settings()
    task, accelerator = training_of(given), Accelerator(cpu=True)
    task.open_data(accelerator)
    _, processor = task.make_model(accelerator, torch.channels_last)
    pretend(monkeypatch, NO, AUGMENT, fault="torchvision: no nvJPEG")
    state, threads = torch.get_rng_state(), torch.get_num_threads()
    arguments = (given, task.datasets["train"], processor, accelerator, 15)
    chosen = device_choice.choose_preprocessing(*arguments)
    assert torch.equal(torch.get_rng_state(), state) and torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert f"auto: {chosen.mode} (no " in said and "this device; no decode: torchvision: no nvJPEG)" in said
    assert device_choice.choose_preprocessing(*arguments, kept=["augment", None]) == AUGMENT


def test_a_run_that_augments_on_the_device(make_settings, tmp_path):
    """Every augmentation, from the workers through the loader to the model; stopped and resumed, bit by bit."""
    run = make_settings(
        crop_min_scale=0.5,
        horizontal_flip=0.5,
        vertical_flip=0.5,
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


def run_one_of_two(rank, settings, port, folder):
    """One process of two, of which only the main one may measure."""
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "MASTER_PORT": port, "LOCAL_WORLD_SIZE": 2}
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "ACCELERATE_USE_CPU": "1"})
    os.environ.update({name: str(value) for name, value in names.items()})
    torch.set_num_threads(1)
    AcceleratorState._reset_state(True)
    device_choice.possible_ways = lambda mode, device: ([NO, AUGMENT], "")
    measured = []

    def rates(ways, *_):
        measured.append(rank)
        return {NO: Rates(1, 1e9), AUGMENT: Rates(1000, 1e9)}

    device_choice.measured_rates = rates
    task = training_of(settings)
    train(settings, task)
    (folder / f"{rank}.json").write_text(json.dumps([task.choices, measured]))


def test_one_process_chooses_for_all(make_settings, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    given = make_settings(max_train_steps=1, num_workers=1)
    fork = multiprocessing.get_context("fork")  # what is imported need not be imported again
    processes = [fork.Process(target=run_one_of_two, args=(rank, given, port, tmp_path)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(120)
    found = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    chosen = {"device_preprocessing": ["augment", None]}
    assert found == [[chosen, [0]], [chosen, []]]


@pytest.mark.gpu
def test_decoding_on_a_gpu(processor):
    """nvJPEG's pixels differ from libjpeg's by its inverse DCT and chroma upsampling: a few levels."""
    device = torch.device("cuda")
    given = settings(reduced_decoding=False, rand_augment_magnitude=0.0, random_erasing=0.0)
    sources = [encode(photograph(90, 120, seed), subsampling=0) for seed in range(16)]
    sources += [encode(photograph(70, 80).convert("L")), encode(photograph(70, 80), progressive=True)]
    exif = Image.Exif()
    exif[0x0112] = 6
    sources.append(encode(photograph(90, 120), exif=exif))
    by_cpu = DevicePipeline(TrainTransform(given, processor), CPU, AUGMENT)(
        batch_of(TrainTransform(given, processor), sources)
    )
    decoders, _ = jpeg_decoders.working_decoders(device)
    assert decoders
    for decoder in decoders:
        made = make_pipeline(given, processor, device, Preprocessing("decode", decoder))
        message = batch_of(made["transform"], [*sources, encode(photograph(70, 80).convert("CMYK"))])
        message["content"] = message["content"].pin_memory()
        result = made["finish"](message)
        assert result["pixel_values"].device.type == "cuda" and made["finish"].decoded_by_cpu == 1
        first, second = by_cpu["pixel_values"], result["pixel_values"][:-1].cpu()
        assert (first - second).abs().mean() * 255 * 0.226 < 3
        truncated = as_bytes(sources[0][: len(sources[0]) // 2])
        header = ExampleHeader(Draws(), height=90, width=120)
        images, _ = decode_upright(decoder, [truncated, as_bytes(sources[1])], [header] * 2, device)
        assert len(images) == 2 and images[1].shape == (3, 90, 120)


@pytest.mark.gpu
def test_a_gpu_chooses_and_trains(make_settings, capfd):
    """`auto` where there is something to choose; the measurement does not fail."""
    results = train(make_settings(max_train_steps=2, num_workers=2, mixup_alpha=0.2, random_erasing=0.5))
    assert results["step"] == 2
    assert re.search(r"device_preprocessing auto: \S.* \(no \d+, augment \d+", capfd.readouterr().out)
