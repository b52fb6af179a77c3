"""What an exported ONNX model says about a photograph; needs onnxruntime, numpy and pillow, no torch.

That is the best five classes, the labels that reach their thresholds, or numbers: what the model was trained for.

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


def predict(folder: str, photo: str, count: int = 5) -> list[tuple[str, float]]:
    """Names and probabilities, or values; the graph of `--preprocessing` normalises and ends in these itself."""
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
    answers = onnxruntime.InferenceSession(folder / "model.onnx").run(None, {"pixel_values": pixels})[0][0]
    best_first = answers.argsort()[::-1]
    if config.get("problem_type") == "regression":
        chosen = range(len(answers))
    elif config.get("problem_type") == "multi_label_classification":
        thresholds = np.float32(config.get("label_thresholds") or [0.5] * len(answers))
        chosen = [i for i in best_first if answers[i] >= thresholds[i]]
    else:
        chosen = best_first[:count]
    return [(config["id2label"][str(i)], float(answers[i])) for i in chosen]


if __name__ == "__main__":
    for name, answer in predict(*sys.argv[1:3]):
        print(f"{answer:10.4g}  {name}")
