"""`hf-poolformer app --allow_any_model`: what visitors may load, on the loopback Hub."""

import json
import shutil

import pytest

from hf_poolformer.hub import publish


ASK = """
import json, sys
from hf_poolformer.app.models import Models
from hf_poolformer.foundation.errors import UserError
from hf_poolformer.foundation.origin import Origin
models = Models([sys.argv[1]], allow_any_model=True, device="cpu", origin=Origin(trust_remote_code=True))
said = {}
for name in sys.argv[2:]:
    try:
        said[name] = type(models.get(name).model).__module__
    except UserError as error:
        said[name] = f"refused: {error}"
print(json.dumps(said))
"""


@pytest.fixture
def published(online, hub, model_dir, tmp_path, hub_token):
    """me/open; me/closed, which is private; me/pickle without safetensors; me/other of another family."""
    (model_dir / "modeling_poolformer.py").write_text("raise SystemExit('code of the repository was run')")
    options = {"verify": False, "endpoint": online.url}
    publish(model_dir, "me/open", **options)
    publish(model_dir, "me/closed", private=True, **options)
    for name in ("me/pickle", "me/other"):
        publish(model_dir, name, **options)
    files = hub.files("me/pickle")
    files["pytorch_model.bin"] = files.pop("model.safetensors")
    hub.files("me/other")["config.json"] = b'{"model_type": "vit"}'
    return model_dir


def test_what_visitors_may_load(hub, published, run_with_hub, hub_token, tiny_models, tmp_path):
    shutil.copytree(tiny_models / "poolformer", tmp_path / "first")
    hub.authorised.clear()
    names = ["me/open", "me/closed", "me/pickle", "me/other", "me/nothing"]
    done = run_with_hub(ASK, tmp_path / "first", *names, token=hub_token)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout.splitlines()[-1])
    assert said["me/open"] == "hf_poolformer.modeling_poolformer", "this package's code, not the repository's"
    assert "The Hub does not give me/closed" in said["me/closed"], "though the operator's token may read it"
    assert "no config.json and safetensors" in said["me/pickle"]
    assert "it is a vit, not a PoolFormer" in said["me/other"]
    assert "The Hub does not give me/nothing" in said["me/nothing"]
    assert hub.authorised == [], "the operator's token went nowhere"
    assert not any(
        "pytorch_model.bin" in path or path.endswith(".py") for _, path in hub.requests[-40:] if "resolve" in path
    )
