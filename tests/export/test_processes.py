"""Loaded exports that are copied, pickled and used by several threads and processes, in every format."""

import copy
import multiprocessing
import pickle
import shutil
import threading
from pathlib import Path

import pytest
import torch
from torch.utils.data import DataLoader, Dataset

from hf_poolformer.export import export_model, load
from hf_poolformer.foundation.errors import UserError


FORMATS = ["onnx", "openvino", "torch"]
PIXELS = torch.randn(3, 3, 64, 64, generator=torch.Generator().manual_seed(0))


@pytest.fixture(scope="module", params=FORMATS)
def exported(request, small_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported") / request.param
    export_model(small_model(), folder, format=request.param, dynamic_size=False)
    return folder


def loaded(folder: Path, threads: int | None = None):
    return load(folder, threads=threads, trust_remote_code=True)


def close(got: torch.Tensor, right: torch.Tensor) -> bool:
    """The same graph with other numbers of threads and images: sums in another order, nothing else."""
    return bool((got - right).abs().max() <= 1e-5 * right.abs().max())


class Images(Dataset):
    def __init__(self, model):
        self.model = model

    def __len__(self) -> int:
        return len(PIXELS)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.model(PIXELS[index : index + 1]).logits[0]


@pytest.mark.parametrize("way", [copy.copy, copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies(way, exported):
    model = loaded(exported)
    twin = way(model)
    assert torch.equal(twin(PIXELS).logits, model(PIXELS).logits)
    assert twin.config.id2label == model.config.id2label and twin.manifest == model.manifest
    assert torch.equal(twin.identity, model.identity)
    assert twin.image_processor.to_dict() == model.image_processor.to_dict()


@pytest.mark.parametrize("threads", [1, 2])
def test_forked_workers_of_a_loader(threads, exported):
    """Whose parent has used the model already: its threads are not there in a fork."""
    model = loaded(exported, threads)
    right = model(PIXELS).logits
    loader = DataLoader(Images(model), batch_size=2, num_workers=2, multiprocessing_context="fork", timeout=120)
    assert close(torch.cat(list(loader)), right)
    assert close(model(PIXELS).logits, right)


@pytest.mark.slow
def test_spawned_workers_of_a_loader(exported):
    """Each imports torch and transformers."""
    model = loaded(exported)
    loader = DataLoader(Images(model), batch_size=2, num_workers=1, multiprocessing_context="spawn", timeout=500)
    assert close(torch.cat(list(loader)), model(PIXELS).logits)


def test_threads(exported):
    model = loaded(exported, 2)
    right = model(PIXELS).logits
    wrong = []

    def work(number: int) -> None:
        for _ in range(5):
            if not close(model(PIXELS[: number + 1]).logits, right[: number + 1]):
                wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 3,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@pytest.mark.parametrize("change", ["gone", "config", "graph", "another"])
def test_a_folder_that_is_not_what_it_was(change, exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copied"))
    model = loaded(folder)
    sent = pickle.dumps(model)
    if change == "gone":
        shutil.rmtree(folder)
    elif change == "another":
        text = (folder / "export.json").read_text()
        (folder / "export.json").write_text(text.replace('"dynamic_size": false', '"dynamic_size": true'))
    else:
        path = folder / ("config.json" if change == "config" else model.manifest.file)
        path.write_bytes(path.read_bytes().replace(b"e", b"f", 1))
    words = {"gone": "is gone", "config": "is not the one", "graph": "is damaged", "another": "another export"}
    with pytest.raises(UserError, match=words[change]):
        pickle.loads(sent)
    assert model(PIXELS).logits.shape == copy.deepcopy(model)(PIXELS).logits.shape == (3, 7)


def test_relative_folders_are_found_from_elsewhere(exported, tmp_path, monkeypatch):
    monkeypatch.chdir(exported.parent)
    sent = pickle.dumps(loaded(Path(exported.name)))
    monkeypatch.chdir(tmp_path)
    assert pickle.loads(sent)(PIXELS).logits.shape == (3, 7)


def ask(model, queue) -> None:
    try:
        model(PIXELS)
        queue.put("answered")
    except UserError as error:
        queue.put(str(error))


def test_a_fork_finds_another_export(exported, tmp_path):
    folder = Path(shutil.copytree(exported, tmp_path / "copied"))
    model = loaded(folder)
    shutil.rmtree(folder)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=ask, args=(model, queue))
    child.start()
    assert "is gone" in queue.get(timeout=60)
    child.join()
