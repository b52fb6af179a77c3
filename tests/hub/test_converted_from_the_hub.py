"""A checkpoint is read by its Hub id."""

import json

from hub_server import TOKEN
from safetensors.torch import save_file
from timm.models.metaformer import Attention, LayerNorm2dNoBias, LayerNormNoBias, MetaFormer, SepConv


def test_the_hub_is_asked_for_ids(hub, run_with_hub, tmp_path):
    model = MetaFormer(
        num_classes=10,
        depths=(1, 1, 2, 1),
        dims=(8, 16, 32, 64),
        norm_layers=[LayerNorm2dNoBias] * 2 + [LayerNormNoBias] * 2,
        token_mixers=[SepConv, SepConv, Attention, Attention],
    )
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    published = {"architecture": "caformer_s18", "pretrained_cfg": {"crop_pct": 0.8}}
    (tmp_path / "config.json").write_text(json.dumps(published))
    code = (
        "import sys\nfrom huggingface_hub import HfApi\nfrom hf_poolformer.conversion.convert import *\n"
        "HfApi().create_repo('me/caformer')\n"
        "HfApi().upload_folder(repo_id='me/caformer', folder_path=sys.argv[1])\n"
        "checkpoint = read_checkpoint('me/caformer')\n"
        "print(checkpoint.family, checkpoint.processor.crop_pct)\n"
        "try:\n    read_checkpoint('me/else')\n"
        "except ConversionError as error:\n    print(error)\n"
    )
    done = run_with_hub(code, str(tmp_path), token=TOKEN)
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert first == "caformer 0.8"
    assert "me/else" in second and "fetched from the Hub" in second
