"""What a model answers to one fixed image, loaded from its folder the way somebody without this package loads it.

`answers` is the measure; verification.py takes it here and, running this file, in a process that cannot import this
package. Hence no relative imports.
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
import transformers
from PIL import Image
from safetensors.torch import save_file


def answers(folder: str, *, code: bool, classes: object = transformers) -> dict[str, torch.Tensor]:
    """Every floating-point output of the model for a seeded image, by its place among the outputs.

    Args:
        folder: a saved model with its processor.
        code: whether to load the code that lies in the folder.
        classes: where the class that `config.json` names is looked up otherwise: `transformers`, or a package.
    """
    config = json.loads(Path(folder, "config.json").read_text(encoding="utf-8"))
    name = config["architectures"][0]
    auto_map = config.get("auto_map", {}) if code else {}
    auto_class = next((auto for auto, place in auto_map.items() if place.rpartition(".")[2] == name), None)
    if auto_class is not None:
        model = getattr(transformers, auto_class).from_pretrained(folder, trust_remote_code=True)
    else:
        model = (getattr(classes, name, None) or getattr(transformers, name)).from_pretrained(folder)
    model.eval()
    channels = config.get("num_channels", 3)
    pixels = np.random.default_rng(0).integers(0, 256, (240, 320, channels), dtype=np.uint8)
    if Path(folder, "preprocessor_config.json").is_file():
        processor = transformers.AutoImageProcessor.from_pretrained(folder, trust_remote_code=code)
        inputs = processor(Image.fromarray(pixels) if channels == 3 else pixels, return_tensors="pt")
    else:
        size = config.get("image_size") or 224
        height, width = (size, size) if isinstance(size, int) else size
        inputs = {"pixel_values": torch.from_numpy(pixels).permute(2, 0, 1)[None, :, :height, :width].float() / 255}
    with torch.inference_mode():
        outputs = model(**inputs).to_tuple()
    return {
        f"{place}": value.contiguous() for place, value in enumerate(tensors_in(outputs)) if value.is_floating_point()
    }


def tensors_in(value: object) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    return [tensor for item in value for tensor in tensors_in(item)] if isinstance(value, (list, tuple)) else []


def main(folder: str, path: str, *ways: str) -> None:
    """Writes the answers of the model in `folder`, loaded in each of `ways` (`code`, `plain`), to `path`."""
    found = {way: answers(folder, code=way == "code") for way in ways}
    save_file({f"{way}.{place}": value for way in ways for place, value in found[way].items()}, path)


if __name__ == "__main__":
    main(*sys.argv[1:])
