"""A folder that is a web page: the model computes in the browser of whoever opens it, by onnxruntime-web.

The graph starts at an image of any size, see `resizing`, and ends in probabilities or numbers. What the page shows is
in `web.json`, the page itself in the folder `page` beside this file: `classify.js` is for pages of one's own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..foundation.errors import UserError
from ..foundation.files import write_json
from ..foundation.names import printable
from ..foundation.strict_json import to_json
from . import onnxruntime_web
from .onnx import Onnx


if TYPE_CHECKING:
    import torch
    from torch import nn

    from .folder import Manifest
    from .format import Run


PAGE = Path(__file__).with_name("page")
PAGE_SETTINGS = "web.json"
# Weights of at least so many numbers are stored in float16; of int8 those that nothing has quantised.
LARGE = 4096
# The image whose answers a browser has to give before the page shows any: (height, width).
CHECKED = (61, 97)
# By how much they may be off: probabilities, by a browser's own float32, or by how it rounds products of 8 bits;
# numbers, as a share of what each varies by.
PROBABILITIES_OFF = {"float32": 0.01, "float16": 0.01, "int8": 0.2}
NUMBERS_OFF = {"float32": 0.02, "float16": 0.02, "int8": 0.5}


class Web(Onnx):
    name = "web"
    runtime = "ONNX Runtime Web"
    precisions = ("float32", "float16", "int8")
    missing_because = {"bfloat16": "onnxruntime-web has no bfloat16"}  # noqa: RUF012
    options = {"vendor": None}  # noqa: RUF012
    detector_precisions = ()
    whole = True

    def check_options(self, vendor: Any) -> None:
        if vendor is not None and vendor is not True and not Path(vendor).exists():
            raise UserError(
                f"--vendor {vendor}: there is no such folder; it takes the unpacked npm package "
                f"{onnxruntime_web.PACKAGE}, or nothing, and then npm fetches it"
            )

    def default_precision(self, calibrated: bool) -> str:
        return "int8" if calibrated else "float16"

    def check_model(self, name: str, model: nn.Module, processor: Any, gives: str) -> None:
        from .resizing import check_processor, gives_one_size

        if gives != "scores" or not model.config.num_labels:
            raise UserError(
                f"--format web makes pages for image classifiers, and {name} gives no classes, labels or numbers; "
                "the other formats take it"
            )
        check_processor(name, processor, model.config.num_channels)
        from .deployable import has_fixed_tokens

        if has_fixed_tokens(model) and not gives_one_size(processor):
            raise UserError(
                f"{name} takes images of one size only, and its image processor makes images of several: it needs "
                "do_center_crop"
            )

    def takes_sizes(self, processor: Any, asked: bool | None) -> bool | None:
        from .resizing import gives_one_size

        if asked is not None:
            raise UserError("--dynamic_size is not for --format web: its page takes images of all sizes, and resizes")
        return not gives_one_size(processor)

    def gather(self, precision: str, vendor: Any) -> dict[str, bytes]:
        return {} if vendor is None else onnxruntime_web.gather(vendor, ways_of(precision))

    def description(self, manifest: Manifest) -> str:
        return f"web page with {self.runtime} {onnxruntime_web.VERSION}: serve the folder, open `index.html`"

    def input_description(self, manifest: Manifest) -> str:
        colours = "RGB, also of grey images" if manifest.num_channels == 1 else "RGB"
        return f"`{manifest.input}`, uint8 (height, width, 3), {colours}, of any size; resized in the graph"

    def arithmetic(self, precision: str) -> str:
        return "float32 on weights in float16" if precision == "float16" else super().arithmetic(precision)

    def arithmetic_elsewhere(self, precision: str) -> str | None:
        return None

    def dtype(self, precision: str) -> str:
        return "float32"

    def open(self, path: Path, manifest: Manifest, threads: int, providers: Sequence[str] | None = None) -> Run:
        """The graph without its front: images are resized by the image processor, as for all formats."""
        import onnx
        import torch

        from .resizing import IMAGE, PIXELS, without_front

        model = onnx.load(path)
        if any(value.name == IMAGE for value in model.graph.input):  # not before `finish`
            model = without_front(model)
        session = self.session(model.SerializeToString(), threads, providers)

        def run(pixel_values: torch.Tensor) -> torch.Tensor:
            return torch.from_numpy(session.run([manifest.output], {PIXELS: pixel_values.numpy()})[0])

        return run

    def open_images(self, path: Path, threads: int) -> Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]]:
        import onnx

        from .resizing import IMAGE, only_front

        front = self.session(only_front(onnx.load(path)).SerializeToString(), threads)
        whole = self.session(path, threads)

        def run(image: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            return front.run(None, {IMAGE: image})[0], whole.run(None, {IMAGE: image})[0]

        return run

    def finish(
        self,
        folder: Path,
        manifest: Manifest,
        processor: Any,
        config: Any,
        spread: Callable[[], torch.Tensor],
        gathered: dict[str, bytes],
    ) -> None:
        import onnx

        from .resizing import IMAGE, append_front

        path = folder / manifest.file
        model = onnx.load(path)
        if manifest.precision != "float32":
            store_halves(model)
        append_front(model, processor, manifest.num_channels)
        onnx.save(model, path)
        manifest.input = IMAGE
        manifest.versions["onnxruntime-web"] = onnxruntime_web.VERSION
        write_page(folder, manifest, config, self.open_images(path, 1), spread, gathered)


def ways_of(precision: str) -> tuple[str, ...]:
    """Ways of computing: in 8 bits WebGPU would hand most of the work back."""
    return ("wasm",) if precision == "int8" else ("webgpu", "wasm")


def store_halves(model: Any) -> None:
    """
    Large weights of a graph in float32 become float16, and float32 again before they are used.

    onnxruntime does that once, when it loads the graph: no kernel has to know float16, which those of WebAssembly and
    of many graphics cards do not.
    """
    from onnx import TensorProto, helper, numpy_helper

    graph, casts = model.graph, []
    for tensor in graph.initializer:
        if tensor.data_type != TensorProto.FLOAT or len(tensor.dims) < 2 or np.prod(tensor.dims) < LARGE:
            continue
        name, values = tensor.name, numpy_helper.to_array(tensor)
        halves = values.astype(np.float16)
        if not np.isfinite(halves).all():
            continue
        tensor.CopyFrom(numpy_helper.from_array(halves, f"{name}_float16"))
        casts.append(helper.make_node("Cast", [tensor.name], [name], name=f"{name}_float32", to=TensorProto.FLOAT))
    nodes = list(graph.node)
    del graph.node[:]
    graph.node.extend([*casts, *nodes])


def check_image(height: int, width: int) -> np.ndarray:
    """uint8 (height, width, 3): bands that bend, as `runtime.js` makes them."""
    y, x = np.mgrid[:height, :width]
    planes = [(2 * x + 3 * y + 40 * c + (x * y >> (4 + c))) & 255 for c in range(3)]
    return np.stack(planes, 2).astype(np.uint8)


def write_page(
    folder: Path,
    manifest: Manifest,
    config: Any,
    run: Callable[[np.ndarray], tuple[np.ndarray, np.ndarray]],
    spread: Callable[[], torch.Tensor],
    gathered: dict[str, bytes],
) -> None:
    from ..foundation.scores import thresholds_of
    from .verification import kind_of

    kind, ways = kind_of(config, manifest.task), ways_of(manifest.precision)
    scores = run(check_image(*CHECKED))[1][0].astype(float)
    if kind == "numbers":
        varies = spread().numpy().astype(float)
        tolerance = [
            float(f"{max(NUMBERS_OFF[manifest.precision] * unit, 1e-3 * abs(score), 1e-6):.3g}")
            for unit, score in zip(varies, scores, strict=True)
        ]
    else:
        tolerance = PROBABILITIES_OFF[manifest.precision]
    names = onnxruntime_web.files_of(ways)
    graph = (folder / manifest.file).read_bytes()
    settings = {
        "model": printable(manifest.source["model"]),
        "kind": kind,
        "precision": manifest.precision,
        "size": len(graph),
        "labels": [str(config.id2label[index]) for index in range(config.num_labels)],
        "thresholds": thresholds_of(config) if kind == "labels" else None,
        "webgpu": "webgpu" in ways,
        "graph": {"file": manifest.file, "integrity": onnxruntime_web.integrity_of(graph)},
        "runtime": {
            "version": onnxruntime_web.VERSION,
            "folder": onnxruntime_web.FOLDER if gathered else onnxruntime_web.CDN,
            "ways": {way: onnxruntime_web.WAYS[way] for way in ways},
            "integrity": {name: f"sha384-{onnxruntime_web.SHA384[name]}" for name in names},
        },
        "check": {
            "height": CHECKED[0],
            "width": CHECKED[1],
            "scores": [float(f"{score:.6g}") for score in scores],
            "tolerance": tolerance,
        },
    }
    write_json(folder / PAGE_SETTINGS, settings)
    if gathered:
        vendor = folder / onnxruntime_web.FOLDER
        vendor.mkdir()
        for name, content in gathered.items():
            (vendor / name).write_bytes(content)
        licence = onnxruntime_web.LICENCE.format(version=onnxruntime_web.VERSION)
        (vendor / "LICENSE").write_text(licence, encoding="utf-8")
    contents = {file.name: file.read_bytes() for file in sorted(PAGE.iterdir()) if file.is_file()}
    worker = contents.pop("sw.js")
    for name, content in contents.items():
        (folder / name).write_bytes(content)
    contents[PAGE_SETTINGS] = (folder / PAGE_SETTINGS).read_bytes()
    sha = hashlib.sha256(worker)
    for name, content in contents.items():
        sha.update(f"{name} {len(content)} ".encode() + content)
    kept = {
        "version": sha.hexdigest()[:16],
        "small": list(contents),
        "large": [manifest.file, *(settings["runtime"]["folder"] + name for name in names)],
    }
    (folder / "sw.js").write_bytes(f"const EXPORT = {to_json(kept)};\n".encode() + worker)
