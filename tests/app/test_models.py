"""Which models a visitor may use. Needs no Gradio."""

import gc
import logging
import shutil
import weakref

import pytest

from hf_poolformer.app.models import KEPT_MODELS, DenseModel, Models
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.prediction.inference import Predictor


def test_tasks_are_told_and_the_latest_models_kept(saved_models):
    names = ["classifier", "segmenter", "detector", "instances"]
    models = Models([str(saved_models / name) for name in names], device="cpu")
    assert models.names == names, "of a folder, visitors see the name only"
    assert isinstance(models.get(None), Predictor)
    loaded = []
    for name, task in list(models.tasks.items())[1:]:
        found = models.get(name)
        assert isinstance(found, DenseModel)
        assert found.task == task
        assert not found.model.training
        assert models.get(name) is found, "loaded once"
        loaded.append(weakref.ref(found.model))
        del found
        gc.collect()
        assert sum(model() is not None for model in loaded) <= KEPT_MODELS
    assert [task.name for task in models.tasks.values()] == [
        "image-classification",
        "semantic-segmentation",
        "object-detection",
        "instance-segmentation",
    ]


def test_folders_of_one_name_are_numbered(saved_models, tmp_path):
    for place in ("a", "b"):
        shutil.copytree(saved_models / "classifier", tmp_path / place / "run")
    models = Models([str(tmp_path / "a" / "run"), str(tmp_path / "b" / "run")], device="cpu")
    assert models.names == ["run", "run (2)"]
    assert models.get("run (2)") is not models.get("run")


@pytest.mark.parametrize("name", ["segmenter", "../models/segmenter", "/etc", "{root}/segmenter", "me/x", "", "."])
@pytest.mark.parametrize("allow_any_model", [False, True])
def test_nothing_but_the_named_models(saved_models, name, allow_any_model, monkeypatch):
    """Above all no folder of this machine, also where any Hub id may be given and a folder is called like one."""
    monkeypatch.chdir(saved_models)
    (saved_models / "me").mkdir(exist_ok=True)
    if not (saved_models / "me" / "x").exists():
        shutil.copytree(saved_models / "segmenter", saved_models / "me" / "x")
    models = Models([str(saved_models / "classifier")], device="cpu", allow_any_model=allow_any_model)
    with pytest.raises(UserError) as caught:
        models.get(name.format(root=saved_models))
    message = str(caught.value)
    if allow_any_model:
        assert "is not a Hub id" in message or "The Hub does not give" in message
    else:
        assert "This page has no model" in message
        assert "but: classifier." in message


def test_what_breaks_later_is_told_without_the_path(saved_models, tmp_path, caplog):
    shutil.copytree(saved_models / "segmenter", tmp_path / "run")
    models = Models([str(saved_models / "classifier"), str(tmp_path / "run")], device="cpu")
    (tmp_path / "run" / "model.safetensors").write_bytes(b"cut off")
    with caplog.at_level(logging.ERROR), pytest.raises(UserError, match="model run cannot be loaded") as caught:
        models.get("run")
    assert str(tmp_path) not in str(caught.value)
    assert str(tmp_path) in caplog.text, "the operator sees which folder"


def test_a_wrong_model_ends_the_start(saved_models, tmp_path):
    shutil.copytree(saved_models / "classifier", tmp_path / "untrained")
    (tmp_path / "empty").mkdir()
    for names, message in {
        (str(tmp_path / "empty"),): "no config.json",
        (str(saved_models / "classifier"), str(tmp_path / "missing")): "there is no folder .*missing",
        (): "no model to show",
    }.items():
        with pytest.raises(UserError, match=message):
            Models(names, device="cpu")
