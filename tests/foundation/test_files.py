"""Who may read what is written, and what is said to those who may not."""

import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from hf_poolformer import PoolFormerConfig, PoolFormerForImageClassification, PoolFormerImageProcessor
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.files import let_others_read
from hf_poolformer.foundation.loading import HERE, load_trained
from hf_poolformer.foundation.tasks import CLASSIFICATION, TASKS


def test_weights_may_be_read_by_whom_other_files_may(tmp_path):
    (tmp_path / "file").touch()
    for name in ("model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"):
        save_file({"weight": torch.zeros(2)}, tmp_path / name)
    for name in ("secret.txt", "somebody.safetensors"):
        (tmp_path / name).touch(mode=0o600)
    let_others_read(tmp_path)
    expected = (tmp_path / "file").stat().st_mode
    assert {path.stat().st_mode for path in tmp_path.glob("model*.safetensors")} == {expected}
    assert all((tmp_path / name).stat().st_mode & 0o077 == 0 for name in ("secret.txt", "somebody.safetensors"))


@pytest.fixture
def somebody_else():
    """A folder, and a user who is neither root nor its owner."""
    folder = Path(tempfile.mkdtemp())  # a test's own folder is closed to others
    folder.chmod(0o755)
    root = hasattr(os, "geteuid") and os.geteuid() == 0
    yield folder, (lambda: os.seteuid(65534)) if root else (lambda: None)
    if root:
        os.seteuid(0)
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


@pytest.mark.skipif(os.name == "nt", reason="Windows has other permissions")
@pytest.mark.parametrize("closed", ["model.safetensors", "config.json", "preprocessor_config.json", "."])
def test_a_model_that_may_not_be_read(somebody_else, closed):
    """safetensors calls it missing."""
    folder, become = somebody_else
    folder /= "model"
    config = PoolFormerConfig(depths=[1, 1, 1, 1], hidden_sizes=[8] * 4)
    PoolFormerForImageClassification(config).save_pretrained(folder)
    PoolFormerImageProcessor().save_pretrained(folder)
    let_others_read(folder)
    load_trained(str(folder), HERE, TASKS[CLASSIFICATION])
    (folder / closed).chmod(0)
    become()
    with pytest.raises(UserError, match=rf"cannot load .* from {folder}: no permission to read {folder / closed}\.$"):
        load_trained(str(folder), HERE, TASKS[CLASSIFICATION])
