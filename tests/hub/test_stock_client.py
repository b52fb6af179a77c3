"""What strangers do with a published model: stock transformers, another process, this package not importable there."""

import json

import pytest
import torch
from PIL import Image
from transformers import AutoImageProcessor, AutoModelForImageClassification

from hf_poolformer.hub import publish


STRANGER = """
import json, sys
sys.modules["hf_poolformer"] = None
import torch
from PIL import Image
from transformers import (AutoBackbone, AutoImageProcessor, AutoModel, AutoModelForImageClassification, pipeline)

picture, first = sys.argv[1:]
image = Image.open(picture)
found = {}

def logits(repo, **options):
    code = {"trust_remote_code": True} if options.get("trust_remote_code") else {}
    processor = AutoImageProcessor.from_pretrained(repo, **code)
    model = AutoModelForImageClassification.from_pretrained(repo, **options).eval()
    with torch.no_grad():
        return model(**processor(image, return_tensors="pt")).logits[0].tolist(), type(model).__module__

found["plain"], module = logits("me/pool")
assert module.startswith("transformers.models.poolformer"), module
found["code"], module = logits("me/pool", trust_remote_code=True)
assert module.startswith("transformers_modules."), module
found["first"], _ = logits("me/pool", revision=first)
found["branch"], _ = logits("me/pool", revision="trial")
found["meta"], _ = logits("me/meta", trust_remote_code=True)
for options in ({}, {"trust_remote_code": True}):
    states = AutoModel.from_pretrained("me/pool", **options).eval()(torch.zeros(1, 3, 32, 32)).last_hidden_state
    assert states.shape == (1, 32, 1, 1), states.shape
backbone = AutoBackbone.from_pretrained("me/meta", trust_remote_code=True, out_indices=[1, 4])
assert len(backbone(torch.zeros(1, 3, 64, 64)).feature_maps) == 2
for repo, options in (("me/pool", {}), ("me/meta", {"trust_remote_code": True})):
    (best, *_) = pipeline("image-classification", repo, **options)(image)
    found["pipeline " + repo] = best
try:
    AutoModelForImageClassification.from_pretrained("me/meta", trust_remote_code=False)
except ValueError as error:
    found["refused"] = str(error)
print(json.dumps(found))
"""


@pytest.fixture
def picture(tmp_path):
    torch.manual_seed(1)
    path = tmp_path / "picture.png"
    Image.fromarray(torch.randint(0, 256, (40, 56, 3), dtype=torch.uint8).numpy()).save(path)
    return path


def answer(folder, picture):
    processor = AutoImageProcessor.from_pretrained(folder)
    model = AutoModelForImageClassification.from_pretrained(folder).eval()
    assert type(model).__module__.startswith("hf_poolformer")
    with torch.no_grad():
        return model(**processor(Image.open(picture), return_tensors="pt")).logits[0]


def test_stock_transformers_load_it_by_its_id(online, run_with_hub, tiny_models, model_dir, picture):
    first = publish(model_dir, "me/pool", endpoint=online.url, verify=False).commit
    old = answer(model_dir, picture)
    model = AutoModelForImageClassification.from_pretrained(model_dir)
    with torch.no_grad():
        model.classifier.weight.mul_(-1)
    model.save_pretrained(model_dir)
    publish(model_dir, "me/pool", endpoint=online.url, verify=False, revision="trial")
    with torch.no_grad():
        model.classifier.weight.mul_(3)
    model.save_pretrained(model_dir)
    publish(model_dir, "me/pool", endpoint=online.url, verify=False)
    publish(tiny_models / "metaformer", "me/meta", endpoint=online.url, verify=False)

    done = run_with_hub(STRANGER, str(picture), first)  # without a token: the repositories are public
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    new, meta = answer(model_dir, picture), answer(tiny_models / "metaformer", picture)
    assert (new - old).abs().max() > 0.1
    # One function in two implementations, float32: rounding only.
    for name, expected in {"plain": new, "code": new, "first": old, "meta": meta}.items():
        torch.testing.assert_close(torch.tensor(found[name]), expected, rtol=1e-4, atol=1e-5, msg=name)
    assert not torch.allclose(torch.tensor(found["branch"]), new, rtol=1e-2)
    for repo, logits in (("me/pool", new), ("me/meta", meta)):
        best = found[f"pipeline {repo}"]
        assert best["label"] == model.config.id2label[logits.argmax().item()]
        assert best["score"] == pytest.approx(logits.softmax(-1).max().item(), rel=1e-3)
    assert "metaformer" in found["refused"] or "trust_remote_code" in found["refused"]


GATE = """
import sys
from huggingface_hub import snapshot_download
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError
for repo, error in (("me/gated", GatedRepoError), ("me/private", RepositoryNotFoundError)):
    try:
        snapshot_download(repo)
    except error:
        print(repo, "refused")
"""


def test_gated_and_private_keep_strangers_out(online, run_with_hub, model_dir, hub_token):
    publish(model_dir, "me/gated", endpoint=online.url, verify=False, gated="auto")
    publish(model_dir, "me/private", endpoint=online.url, verify=False, private=True)
    assert run_with_hub(GATE).stdout == "me/gated refused\nme/private refused\n"
    assert run_with_hub(GATE, token=hub_token).stdout == ""
