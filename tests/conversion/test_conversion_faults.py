"""Conversion where something is wrong: the disk, another program, files that contradict each other or lack a part."""

import contextlib
import errno
import json
import os
import signal
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from golden_models import golden
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification

from hf_poolformer.conversion import convert as conversion
from hf_poolformer.conversion.convert import ConversionError, convert, read_checkpoint
from hf_poolformer.foundation import folders
from hf_poolformer.foundation.errors import UserError


TARGETS = ["hf", "official", "timm"]


@pytest.fixture
def source(tmp_path):
    """A file that can be converted to every target."""
    (tmp_path / "in").mkdir()
    torch.save(golden("poolformerv2")[0], tmp_path / "in" / "poolformerv2.pth")
    return tmp_path / "in" / "poolformerv2.pth"


@pytest.fixture
def ours(tmp_path):
    """A folder of ours whose pool size no weight tells."""
    torch.save(golden("poolformer_v1")[0], tmp_path / "poolformer.pth")
    convert(tmp_path / "poolformer.pth", tmp_path / "ours", overrides={"pool_size": 7})
    return tmp_path / "ours"


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


# The disk ---------------------------------------------------------------------------------------------------


@pytest.fixture(params=["before", "at the weights", "at the end"])
def full_disk(request, monkeypatch, tmp_path):
    """Makes the disk full: by its free space, while the weights are written, or at the last rename."""

    @contextlib.contextmanager
    def full():
        if request.param == "before":
            usage = conversion.shutil.disk_usage(tmp_path)
            monkeypatch.setattr(conversion.shutil, "disk_usage", lambda _: usage._replace(free=12_000))
            message = r"the disk is full: it needs 0\.\d\d MB, 0\.01 MB are free"
        elif request.param == "at the end":
            monkeypatch.setattr(folders, "_move", no_space)
            message = r"the disk is full: it needs"
        else:
            resource = pytest.importorskip("resource")
            before = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (150_000, before[1]))
            message = r"larger than is allowed here: it needs 0\.\d\d MB, [\d,.]+ MB are free"
        try:
            with pytest.raises(ConversionError, match=message) as caught:
                yield
            assert "\n" not in str(caught.value)
        finally:
            if request.param == "at the weights":
                resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return full


def no_space(*_):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_is_one_line_and_leaves_nothing(to, full_disk, source, tmp_path):
    with full_disk():
        convert(source, tmp_path / "deep" / "er" / "out", to=to)
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


@pytest.mark.parametrize("to", TARGETS)
def test_a_full_disk_leaves_what_was_there(to, full_disk, source, tmp_path):
    out = tmp_path / "out"
    convert(source, out, to=to)
    before = files(out)
    with full_disk():
        convert(source, out, to=to, overwrite=True)
    assert files(out) == before
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_last_rename_that_fails_puts_the_old_folder_back(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    convert(source, out, to="official")
    before = files(out)
    rename = type(out).rename

    def refuse(path, target):
        if path.name.startswith("new-"):
            no_space()
        return rename(path, target)

    monkeypatch.setattr(type(out), "rename", refuse)
    with pytest.raises(ConversionError, match="the disk is full"):
        convert(source, out, to="official", overwrite=True)
    assert files(out) == before


@pytest.mark.parametrize("given", ["in", "in/poolformerv2.pth"])
def test_the_checkpoint_itself_is_not_replaced(given, source, tmp_path):
    with pytest.raises(ConversionError, match="in holds the checkpoint itself, which would be lost"):
        convert(tmp_path / given, source.parent, overwrite=True)
    assert source.exists()


def test_a_link_stays_one(source, tmp_path):
    (tmp_path / "disk" / "real").mkdir(parents=True)
    (tmp_path / "out").symlink_to("disk/real")
    convert(source, tmp_path / "out", to="official")
    convert(source, tmp_path / "out", to="timm", overwrite=True)
    assert (tmp_path / "out").is_symlink()
    assert files(tmp_path / "disk").keys() == {"real/model.safetensors"}


# Several programs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("there", [None, "empty", "full"])
def test_of_several_conversions_to_one_place_one_succeeds(there, source, tmp_path, monkeypatch):
    out, count = tmp_path / "out", 4
    if there == "empty":
        out.mkdir()
    if there == "full":
        convert(source, out, to="timm")
    results, refused = [], threading.Semaphore(0)
    write = conversion.write_official

    def slow(checkpoint, folder):
        """Nobody is through before all have tried."""
        for _ in range(count - 1):
            assert refused.acquire(timeout=60)
        write(checkpoint, folder)

    def one(_):
        try:
            convert(source, out, to="official", overwrite=True)
        except UserError as error:
            results.append(str(error))
            refused.release()
        else:
            results.append(None)

    monkeypatch.setattr(conversion, "write_official", slow)
    with ThreadPoolExecutor(count) as pool:
        list(pool.map(one, range(count)))
    assert results.count(None) == 1
    assert all("another conversion to" in text and "is at work" in text for text in results if text)
    assert files(out).keys() == {"poolformerv2.pth"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


def test_a_folder_that_came_meanwhile_stays(source, tmp_path, monkeypatch):
    out = tmp_path / "out"
    write = conversion.write_official

    def slow(checkpoint, folder):
        write(checkpoint, folder)
        out.mkdir()
        (out / "thesis.tex").write_text("dear")

    monkeypatch.setattr(conversion, "write_official", slow)
    with pytest.raises(ConversionError, match=r"is not replaced: thesis\.tex"):
        convert(source, out, to="official", overwrite=True)
    assert files(out) == {"thesis.tex": b"dear"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.parametrize("moved", [True, False])
def test_what_a_killed_conversion_left_is_cleared(moved, source, tmp_path):
    pytest.importorskip("fcntl")
    out, left = tmp_path / "out", tmp_path / ".out.conversion"
    convert(source, out, to="official")
    before = files(out)
    (left / "new-x").mkdir(parents=True)
    (left / "new-x" / "model.safetensors").write_bytes(b"half")
    if moved:  # killed between its two renames
        (left / "old-x").mkdir()
        out.rename(left / "old-x" / "out")
    with pytest.raises(ConversionError, match="is not empty; give another folder, or --overwrite"):
        convert(source, out, to="official")
    assert files(out) == before
    convert(source, out, to="timm", overwrite=True)
    assert files(out).keys() == {"model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


@pytest.mark.slow
def test_kill_9_in_the_middle(source, tmp_path):
    code = (
        "import os, sys\nfrom hf_poolformer.conversion import convert as conversion\nrename = conversion.Path.rename\n"
        "def kill(path, target):\n    if path.name[:4] == 'new-' and not target.exists():\n"
        "        os.kill(os.getpid(), 9)\n"
        "    return rename(path, target)\nconversion.Path.rename = kill\n"
        "conversion.convert(sys.argv[1], sys.argv[2], to='timm', overwrite=True)\n"
    )
    out = tmp_path / "out"
    convert(source, out, to="official")
    before = files(out)
    done = subprocess.run([sys.executable, "-c", code, str(source), str(out)], env=os.environ, timeout=300)
    assert done.returncode == -signal.SIGKILL
    assert not out.exists()
    with pytest.raises(ConversionError, match="is not empty"):
        convert(source, out, to="hf")
    assert files(out) == before
    convert(source, out, to="timm", overwrite=True)
    assert {path.name for path in tmp_path.iterdir()} == {"in", "out"}


# Files that contradict each other ---------------------------------------------------------------------------


def edit(folder, **fields):
    content = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(content | fields))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"depths": [1, 1, 1, 1]}, r"depths is \(1, 1, 1, 1\) there, \(1, 1, 2, 1\) in the weights"),
        ({"hidden_sizes": [8, 16, 32, 48]}, "hidden_sizes is"),
        ({"use_layer_scale": False}, "use_layer_scale is False there, True in the weights"),
        ({"mlp_ratio": 2.0}, "mlp_ratio is 2.0 there, 4.0 in the weights"),
        ({"id2label": {"0": "a", "1": "b"}, "label2id": {"a": 0, "b": 1}}, "num_labels is 2 there, 10 in the weights"),
        ({"num_channels": 1}, "num_channels is 1 there, 3 in the weights"),
        ({"model_type": "resnet"}, "is a resnet model"),
    ],
)
@pytest.mark.parametrize("name", [".", "model.safetensors"])
def test_a_config_that_contradicts_the_weights_is_refused(name, fields, message, ours):
    edit(ours, **fields)
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(ours / name)


def test_the_config_beside_a_file_counts(ours):
    assert read_checkpoint(ours / "model.safetensors").config.pool_size == 7
    torch.save(golden("poolformer_v1")[0], ours / "poolformer_s12.pth")  # in the official format
    checkpoint = read_checkpoint(ours / "poolformer_s12.pth")
    assert checkpoint.config.pool_size == 7
    assert any("config.json beside poolformer_s12.pth was taken" in note for note in checkpoint.notes)
    edit(ours, model_type="resnet")
    checkpoint = read_checkpoint(ours / "poolformer_s12.pth")
    assert checkpoint.config.pool_size == 3
    assert any("is of another model, and was not used" in note for note in checkpoint.notes)


def test_the_config_of_ours_counts_for_official_weights(ours):
    (ours / "model.safetensors").unlink()
    torch.save(golden("poolformer_v1")[0], ours / "pytorch_model.bin")
    assert read_checkpoint(ours).config.pool_size == 7


@pytest.mark.parametrize("name", ["", "poolformer.pth"])
def test_the_config_of_a_trainer_counts(name, tmp_path):
    torch.save(golden("poolformer_v1")[0], tmp_path / "poolformer.pth")
    (tmp_path / "config.json").write_text(json.dumps({"lr": 0.1, "model": {"pool_size": 5}}))
    assert read_checkpoint(tmp_path / name).config.pool_size == 5


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"architecture": "resnet50"}, "config.json says resnet50, but its weights are those of caformer"),
        ({"architecture": "poolformer_s12"}, "config.json says poolformer_s12, but its weights are those of caformer"),
        ({"architecture": "caformer_s18", "num_classes": 7}, "config.json says 7 classes, the weights have 10"),
    ],
)
def test_a_config_of_timm_that_contradicts_the_weights_is_refused(config, message, tmp_path):
    torch.save(golden("caformer")[0], tmp_path / "pytorch_model.bin")
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(tmp_path)


# Files that lack a part, or are one too many ----------------------------------------------------------------


def write_shards(folder, names):
    weights, _ = golden("caformer")
    for index, name in enumerate(names):
        save_file({key: value for i, (key, value) in enumerate(weights.items()) if i % 3 == index}, folder / name)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["model-00001-of-00003", "model-00002-of-00003"], "of the 3 files of its weights these lack: 3"),
        (["model-00001-of-00002", "model-00002-of-00003"], "shards of different models"),
        (["model-00001-of-00003", "model"], "which file"),
    ],
)
def test_shards_that_are_not_one_model(names, message, tmp_path):
    write_shards(tmp_path, [f"{name}.safetensors" for name in names])
    with pytest.raises(ConversionError, match=message):
        read_checkpoint(tmp_path)


def test_one_of_several_shards_is_no_model(tmp_path):
    names = [f"model-0000{index}-of-00003.safetensors" for index in (1, 2, 3)]
    write_shards(tmp_path, names)
    assert read_checkpoint(tmp_path).family == "caformer"
    with pytest.raises(ConversionError, match="is one of 3 files of its weights; give their folder"):
        read_checkpoint(tmp_path / names[1])


def test_a_second_file_of_weights_is_named(ours):
    weights = load_file(ours / "model.safetensors")
    torch.save({key: torch.zeros_like(value) for key, value in weights.items()}, ours / "pytorch_model.bin")
    checkpoint = read_checkpoint(ours)
    assert checkpoint.tensors["norm.weight"].abs().sum() > 0
    assert any("pytorch_model.bin beside it was not read" in note for note in checkpoint.notes)


def test_two_checkpoints_in_a_folder_are_a_question(source):
    torch.save(golden("caformer")[0], source.parent / "last.pth.tar")
    with pytest.raises(ConversionError, match=r"which file.* last.pth.tar, poolformerv2.pth; give its path"):
        read_checkpoint(source.parent)


@pytest.mark.parametrize("name", ["config.json", "preprocessor_config.json", "model.safetensors"])
def test_empty_files_are_named(name, ours):
    (ours / name).write_bytes(b"")
    with pytest.raises(ConversionError, match=name):
        read_checkpoint(ours)


# Numbers ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_precisions_are_kept(dtype, source, tmp_path):
    torch.save({key: value.to(dtype) for key, value in golden("poolformerv2")[0].items()}, source)
    convert(source, tmp_path / "out")
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "out").dtype == dtype


@pytest.mark.parametrize("other", [torch.bfloat16, torch.float64])
def test_mixed_precisions_lose_nothing(other, source, tmp_path):
    """A folder has one precision: the widest."""
    weights = {key: value.to(other) if value.ndim > 1 else value for key, value in golden("poolformerv2")[0].items()}
    torch.save(weights, source)
    checkpoint = convert(source, tmp_path / "out")
    assert any("all were made" in note for note in checkpoint.notes)
    model = AutoModelForImageClassification.from_pretrained(tmp_path / "out")
    kept = model.state_dict()
    assert len({value.dtype for value in kept.values()}) == 1
    assert torch.equal(kept["norm.weight"].float(), weights["norm.weight"])
    assert torch.equal(kept["classifier.weight"].to(other), weights["head.weight"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda value: value.to(torch.float8_e4m3fn), "weights in 8 bits, which say nothing without their scales"),
        (lambda value: value.to(torch.int8), "no floating-point numbers"),
        (lambda value: value.to(torch.complex64), "no floating-point numbers"),
        (lambda value: value.to_sparse(), "stored sparsely"),
        (lambda value: value.to("meta"), "weights without numbers"),
    ],
)
def test_other_numbers_are_refused(change, message, source):
    torch.save({key: change(value) for key, value in golden("poolformerv2")[0].items()}, source)
    with pytest.raises(ConversionError, match=message) as caught:
        read_checkpoint(source)
    assert len(str(caught.value)) < 600
