"""The best five classes of a photograph, from an exported ONNX model; needs onnxruntime, numpy and pillow, no torch.

hf-poolformer export outputs/pets outputs/pets-onnx --preprocessing
pip install onnxruntime numpy pillow
python examples/onnx_predict.py outputs/pets-onnx photo.jpg
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image


def best_classes(folder: str, photo: str, count: int = 5) -> list[tuple[str, float]]:
    """Names and probabilities; the graph of `--preprocessing` normalises and ends in probabilities itself."""
    folder = Path(folder)
    config, processor = (
        json.loads((folder / f"{name}.json").read_text()) for name in ("config", "preprocessor_config")
    )
    image, crop = Image.open(photo), processor["crop_size"]["height"]
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)  # as the model was trained
    image = image.convert("RGB")
    short = int(processor["size"]["shortest_edge"] / processor["crop_pct"])
    size = [int(short * side / min(image.size)) for side in image.size]
    image = image.resize(size, Image.Resampling.BICUBIC)
    left, top = (round((side - crop) / 2) for side in size)
    pixels = np.asarray(image.crop((left, top, left + crop, top + crop)))[None]
    probabilities = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"pixel_values": pixels})[0][0]
    return [(config["id2label"][str(i)], float(probabilities[i])) for i in probabilities.argsort()[::-1][:count]]


if __name__ == "__main__":
    for name, probability in best_classes(*sys.argv[1:3]):
        print(f"{probability:7.2%}  {name}")
