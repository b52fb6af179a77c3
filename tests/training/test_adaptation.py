import copy
import sys

import pytest
import torch
from accelerate import DistributedType
from datasets import Dataset
from PIL import ImageOps
from safetensors.torch import load_file
from transformers import AutoModelForImageClassification, ViTConfig, ViTForImageClassification

from hf_poolformer.foundation.errors import UserError
from hf_poolformer.training import loop, preparation
from hf_poolformer.training.adaptation import LinearProbe, adapt, adapted_layers, merged
from hf_poolformer.training.loop import train


def weights(folder):
    return load_file(folder / "model.safetensors")


def changed(mine, theirs):
    assert mine.keys() == theirs.keys()
    return {name for name in mine if not torch.equal(mine[name], theirs[name])}


def digits_batch(count=4, side=32):
    return torch.randn(count, 3, side, side)


# --- linear probe ----------------------------------------------------------------------------------------------------


def test_a_linear_probe_trains_the_head_and_nothing_else(make_settings_from, make_checkpoint, tmp_path, capsys):
    base = make_checkpoint()
    changes = {"learning_rate": 1e-2, "weight_decay": 0.5, "ema_decay": 0.5, "drop_path_rate": 0.5}
    results = train(make_settings_from(base, freeze_backbone=True, max_train_steps=4, **changes))
    head = {"classifier.weight", "classifier.bias"}
    assert changed(weights(tmp_path / "run"), weights(tmp_path / "checkpoint")) == head
    assert results["trained_parameters"] == 330
    assert "330 of them trained" in capsys.readouterr().out
    state = torch.load(tmp_path / "run/checkpoints/step-4/state.pt", weights_only=True)
    assert len(state["optimizer"]["state"]) == 2
    card = (tmp_path / "run/README.md").read_text()
    assert "training nothing but the head (linear probe)" in card
    assert "| parameters trained | 330 |" in card and "| `freeze_backbone` | True |" in card


@pytest.mark.parametrize("metaformer", [None, "convformer_s18", "randformer_s12"])
def test_a_linear_probe_runs_its_backbone_as_in_use(make_settings_from, make_checkpoint, metaformer):
    base = make_checkpoint(metaformer=metaformer, drop_path_rate=0.5)
    model = AutoModelForImageClassification.from_pretrained(base)
    reference = copy.deepcopy(model).eval()
    adapt(model, make_settings_from(base, freeze_backbone=True))
    probe = LinearProbe(model).train()
    modes = []
    block = model.base_model.encoder.block[1]
    block.register_forward_hook(lambda *_: modes.append((torch.is_grad_enabled(), block.training)))
    pixel_values, labels = digits_batch(), torch.arange(4)
    logits = probe(pixel_values=pixel_values).logits
    assert modes == [(False, False)] and model.classifier.training and torch.is_grad_enabled()
    torch.nn.functional.cross_entropy(logits, labels).backward()
    expected = reference(pixel_values).logits
    torch.nn.functional.cross_entropy(expected, labels).backward()
    # The blocks are computed all at once without gradients and one by one with them.
    torch.testing.assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    gradients = dict(reference.named_parameters())
    for name, parameter in model.named_parameters():
        if name.startswith("classifier."):
            torch.testing.assert_close(parameter.grad, gradients[name].grad, rtol=1e-3, atol=1e-4)
        else:
            assert parameter.grad is None and not parameter.requires_grad
    with torch.no_grad():
        assert not probe(pixel_values=pixel_values).logits.requires_grad
    assert not model.classifier._forward_pre_hooks


# --- adapters --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("metaformer", "changes", "expected"),
    [
        (None, {}, {"output.conv1", "output.conv2"}),
        ("poolformerv2_s12", {}, {"output.conv1", "output.conv2"}),
        ("randformer_s12", {}, {"output.conv1", "output.conv2"}),
        ("metaformer_ppff_s12", {}, {"token_mixer.fc", "output.conv1", "output.conv2"}),
        (
            "caformer_s18",
            {"attention_head_dim": 8},
            {
                "token_mixer.pwconv1",
                "token_mixer.pwconv2",
                "token_mixer.qkv",
                "token_mixer.proj",
                "output.conv1",
                "output.conv2",
            },
        ),
    ],
)
def test_adapters_of_every_family_begin_as_nothing_and_merge(
    make_settings_from, make_checkpoint, scramble, metaformer, changes, expected
):
    base = make_checkpoint(metaformer=metaformer, **changes)
    model = AutoModelForImageClassification.from_pretrained(base).eval()
    names = adapted_layers(model)
    assert {".".join(name.split(".")[-2:]) for name in names} == expected
    assert all(".block." in name for name in names)
    pixel_values = digits_batch()
    before, keys = model(pixel_values).logits, model.state_dict().keys()
    adapt(model, make_settings_from(base, lora=2))
    # Plain PyTorch in the place of fused operations.
    torch.testing.assert_close(model(pixel_values).logits, before, rtol=1e-4, atol=1e-4)
    trained = [name for name, parameter in model.named_parameters() if parameter.requires_grad]
    assert {name for name in trained if "lora_" not in name} == {
        name for name in keys if name.startswith("classifier.")
    }
    assert sum(".lora_A." in name for name in trained) == len(names)

    scramble(model)
    adapted = model(pixel_values).logits
    assert not torch.allclose(adapted, before, rtol=0.1)
    plain = merged(model)
    assert plain.state_dict().keys() == keys and not any("peft" in name or "lora" in name for name in vars(plain))
    torch.testing.assert_close(plain(pixel_values).logits, adapted, rtol=1e-3, atol=1e-3 * adapted.abs().max().item())
    assert any("lora_" in name for name, _ in model.named_parameters())  # of a copy


def test_a_run_with_adapters_leaves_an_ordinary_model(make_settings_from, make_checkpoint, tmp_path, monkeypatch):
    base = make_checkpoint()
    settings = make_settings_from(
        base, lora=3, lora_dropout=0.1, num_train_epochs=2, learning_rate=1e-2, layer_decay=1.0, eval_epochs=1
    )
    kept, save = {}, loop.leave_model
    monkeypatch.setattr(loop, "leave_model", lambda run: kept.update(model=run.state.model) or save(run))
    results = train(settings)
    run = tmp_path / "run"
    start, end = weights(tmp_path / "checkpoint"), weights(run)
    touched = changed(end, start)
    assert touched == {
        *(f"poolformer.encoder.block.{stage}.0.output.conv{number}.weight" for stage in range(4) for number in (1, 2)),
        "classifier.weight",
        "classifier.bias",
    }
    # Each weight has moved by a matrix of the adapters' rank.
    name = "poolformer.encoder.block.2.0.output.conv1.weight"
    assert torch.linalg.matrix_rank((end[name] - start[name]).flatten(1), rtol=1e-4) == 3
    loaded, info = AutoModelForImageClassification.from_pretrained(run, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    pixel_values = digits_batch()
    with torch.no_grad():
        adapted = kept["model"].eval()(pixel_values=pixel_values).logits
        torch.testing.assert_close(loaded.eval()(pixel_values).logits, adapted, rtol=1e-3, atol=1e-3)
    # The frozen weights of the checkpoint, whose state of the optimiser is the adapters' and the head's.
    saved = weights(run / "checkpoints/step-20")
    assert torch.equal(saved[name.replace("weight", "base_layer.weight")], start[name])
    state = torch.load(run / "checkpoints/step-20/state.pt", weights_only=True)
    assert len(state["optimizer"]["state"]) == 2 * 8 + 2
    assert results["trained_parameters"] == 330 + sum(3 * 5 * width for width in (8, 16, 32, 32)) * 2
    card = (run / "README.md").read_text()
    assert "training the head and LoRA adapters of rank 3, merged into the weights" in card
    assert "| `lora` | 3 |" in card and "freeze_backbone" not in card


def test_adapters_with_everything_else(make_settings_from, make_checkpoint, tmp_path, own_precision):
    results = train(
        make_settings_from(
            make_checkpoint(drop_path_rate=0.2),
            teacher=make_checkpoint("teacher"),
            lora=2,
            lora_alpha=8,
            ema_decay=0.9,
            gradient_checkpointing=True,
            gradient_accumulation_steps=3,
            mixup_alpha=0.8,
            mixed_precision="bf16",
            max_train_steps=3,
        )
    )
    assert results["step"] == 3
    assert not [name for name in weights(tmp_path / "run") if "lora" in name]


# --- both ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [{"lora": 2}, {"freeze_backbone": True}])
def test_resuming_with_another_method_is_refused(make_settings_from, make_checkpoint, method):
    base = make_checkpoint()
    train(make_settings_from(base, max_train_steps=1, **method))
    [name] = method
    again = {"max_train_steps": 1, "resume_from_checkpoint": "latest"}
    with pytest.raises(UserError, match=f"was made with --{name}; go on with the same setting"):
        train(make_settings_from(base, **again))
    if name == "lora":
        with pytest.raises(UserError, match="was made with --lora 2"):
            train(make_settings_from(base, lora=4, **again))


@pytest.mark.parametrize("method", [{"lora": 2}, {"freeze_backbone": True}])
def test_mistakes_are_reported(make_settings, make_settings_from, make_checkpoint, monkeypatch, method):
    [name] = method
    with pytest.raises(UserError, match=f"--{name} adapts a trained model: give one with --model_name_or_path"):
        make_settings(**method)
    with pytest.raises(UserError, match="--lora and --freeze_backbone exclude each other"):
        make_settings(lora=2, freeze_backbone=True)
    base = make_checkpoint()

    class Sharded(preparation.Accelerator):
        distributed_type = DistributedType.FSDP

    with monkeypatch.context() as patch, pytest.raises(UserError, match="FSDP is not supported here"):
        patch.setattr(preparation, "Accelerator", Sharded)
        train(make_settings_from(base, **method))
    vit = ViTForImageClassification(ViTConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=1))
    adapt(vit, make_settings_from(base, **method))  # other models have heads and linear layers, too
    assert vit.classifier.weight.requires_grad and not vit.vit.embeddings.cls_token.requires_grad
    with pytest.raises(UserError, match="which part of a Sequential is its head"):
        adapt(torch.nn.Sequential(torch.nn.Linear(2, 2)), make_settings_from(base, **method))


def test_without_peft(make_settings_from, make_checkpoint, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(UserError, match=r"--lora needs PEFT. Install it with: pip install 'hf-poolformer\[lora\]'"):
        train(make_settings_from(make_checkpoint(), lora=2))


@pytest.mark.slow
def test_what_is_trained_learns(make_settings, make_settings_from, all_digits, tmp_path):
    """From a model that knows digits as they are to one that knows their negatives."""
    common = {"label_smoothing": 0.0, "layer_decay": 1.0, "checkpointing_steps": "no", "learning_rate": 1e-2}
    train(make_settings(dataset_name=str(all_digits), num_train_epochs=15, **common))
    negatives = tmp_path / "negatives"
    negatives.mkdir()
    for path in all_digits.iterdir():
        shard = Dataset.from_parquet(str(path), cache_dir=str(tmp_path / "cache"))
        shard.map(lambda row: {"image": ImageOps.invert(row["image"])}).to_parquet(negatives / path.name)
    ways = {
        "nothing": {"max_train_steps": 1, "learning_rate": 0.0, "warmup_learning_rate": 0.0, "min_learning_rate": 0.0},
        "head": {"freeze_backbone": True},
        "adapters": {"lora": 4},
        "everything": {},
    }
    accuracy = {}
    for name, way in ways.items():
        changes = {**common, "dataset_name": str(negatives), "num_train_epochs": 5, **way}
        results = train(make_settings_from(str(tmp_path / "run"), output_dir=str(tmp_path / name), **changes))
        accuracy[name] = results["eval_accuracy"]
    print(accuracy)
    assert accuracy["nothing"] + 0.1 < accuracy["head"] < accuracy["adapters"] < accuracy["everything"]
