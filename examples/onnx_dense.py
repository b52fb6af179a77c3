"""What an exported segmenter or detector finds in a photograph; needs onnxruntime, numpy and pillow, no torch.

Of a segmenter it says how much of the picture each class covers, and writes the map of classes as a PNG whose pixels
are class indices. Of a detector it says the objects, their scores and boxes (left, top, right, bottom, in pixels).

hf-poolformer export outputs/segmenter outputs/segmenter-onnx --preprocessing
pip install onnxruntime numpy pillow
python examples/onnx_dense.py outputs/segmenter-onnx photo.jpg map.png
"""

import json
import sys
from pathlib import Path

import numpy as np
import onnxruntime
from PIL import Image, ImageOps


def read_photo(photo: str) -> np.ndarray:
    """(1, height, width, 3), uint8, upright, transparency on white, as the model was trained."""
    image = ImageOps.exif_transpose(Image.open(photo))
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return np.asarray(image.convert("RGB"))[None]


def find(folder: str, photo: str) -> tuple[list[str], dict[str, np.ndarray]]:
    """The names of the classes, and what the graph of `--preprocessing` gives, which resizes by itself."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text())
    names = [config["id2label"][str(index)] for index in range(len(config["id2label"]))]
    session = onnxruntime.InferenceSession(folder / "model.onnx")
    outputs = [output.name for output in session.get_outputs()]
    return names, dict(zip(outputs, session.run(outputs, {"pixel_values": read_photo(photo)}), strict=True))


def main(folder: str, photo: str, picture: str | None = None) -> None:
    names, found = find(folder, photo)
    if "classes" in found:
        (classes,) = found["classes"]  # (height, width), of the photograph's size
        for index, count in zip(*np.unique(classes, return_counts=True), strict=True):
            print(f"{count / classes.size:8.1%}  {names[index]}")
        if picture:
            Image.fromarray(classes.astype(np.uint8 if len(names) <= 256 else np.uint16)).save(picture)
        return
    # The graph leaves out what has a lower score than the model's `score_threshold`; here only what is likely.
    for box, score, label in zip(found["boxes"], found["scores"], found["labels"], strict=True):
        if score >= 0.5:
            print(f"{score:8.2f}  {names[label]}  {' '.join(f'{edge:.0f}' for edge in box)}")


if __name__ == "__main__":
    main(*sys.argv[1:4])
