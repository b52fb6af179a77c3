"""`export_model`: from a trained model to a verified folder that needs no PyTorch to be used."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from .. import __version__
from ..data.transforms import channels_of, input_size
from ..foundation.errors import UserError
from ..foundation.files import write_json
from ..foundation.loading import load_trained, task_of_checkpoint
from ..foundation.machine import versions_of
from ..foundation.origin import Origin
from ..foundation.scores import check_choice
from ..foundation.tasks import TASKS
from ..token_mixers import Attention
from .card import export_card
from .dense_verification import odd_photographs, read_photographs, verify_maps, verify_objects
from .deployable import DTYPES, Deployable, has_fixed_tokens, largest_size, smallest_size, write_graph
from .folder import REPORT, SETTINGS, Manifest, check_output, files_of, folder_size, new_folder
from .format import PRECISIONS, ExportFormat
from .formats import FORMATS, check_request
from .graph import fold
from .images import Sample, check_channels, cropping, odd_images, read_samples, sample_photographs
from .photographs import check_processor, fixed_size
from .quantisation import Quality, quantise
from .resizing import gives_one_size
from .runtime import ExportedModel, Graph, image_processor_of, load
from .verification import FEWEST, Comparison, Report, kind_of, verify, verify_images


# Photographs to compare on where no dataset is given, or one that is too small.
PHOTOGRAPHS = 8
# Of a segmenter, whose answers are large, so many calibration images tell how well it was quantised.
MAPS = 16


@dataclass
class Summary:
    """What `export_model` wrote, and how it compares with the model."""

    output: Path
    manifest: Manifest
    report: Report
    size: int

    def __str__(self) -> str:
        report, manifest = self.report, self.manifest
        lines = [
            f"{self.output}: {manifest.format}, {manifest.precision}, {megabytes(self.size)} "
            f"(weights in float32: {megabytes(report.size_before)})",
            f"verified in {len(report.checks)} comparisons: largest difference {report.worst}; {report.agreed}",
            f"arithmetic: {report.arithmetic}",
        ]
        if manifest.computed_by is not None:
            lines.append(manifest.computed_by)
        lines += [f"{name}: {values}" for name, values in report.measured]
        if manifest.quantisation is not None:
            lines.append(
                f"{manifest.quantisation['quantised_layers']} layers in 8 bits; in floating point: "
                f"{manifest.quantisation['left_in_floating_point']}"
            )
        return "\n".join(lines)


def megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"


def export_model(
    model: str | os.PathLike,
    output: str | os.PathLike,
    *,
    format: str = "onnx",
    precision: str | None = None,
    dynamic_size: bool | None = None,
    preprocessing: bool = False,
    opset: int | None = None,
    compile: bool = False,
    device: str | None = None,
    vendor: str | os.PathLike | bool | None = None,
    calibration_dataset: str | None = None,
    calibration_config_name: str | None = None,
    calibration_split: str | None = None,
    image_column_name: str | None = None,
    calibration_size: int = 300,
    verification_size: int = 200,
    revision: str = "main",
    token: str | None = None,
    cache_dir: str | None = None,
    trust_remote_code: bool = False,
    overwrite: bool = False,
    progress: Callable[[str], None] = lambda what: None,
) -> Summary:
    """
    Writes a folder with the folded graph, `config.json`, `preprocessor_config.json`, `export.json` (see `Manifest`),
    `verification.json` and a card. The folder appears when the export has been compared with the model, not before.

    Args:
        model: folder or Hub id of an image classifier, a semantic segmenter or a detector.
        output: the folder.
        format: one of `formats.FORMATS`: "onnx", "openvino", "torch" (a program of `torch.export`), "executorch" and
            "coreml" (for phones), or "web" (a page).
        precision: "float32"; "float16" (OpenVINO and web: of the weights in the file, computed in float32); "bfloat16"
            (OpenVINO and torch); "int8" (all but torch and Core ML), which needs `calibration_dataset`. None is
            "float32", of "web" "int8" with a `calibration_dataset` and "float16" without.
        dynamic_size: whether images of other sizes than the model's are taken; None where the family allows it and
            the format is not made for one size (`ExportFormat.sizes`).
        preprocessing: take uint8 (batch, height, width, channels), resized and cropped, and give probabilities; of a
            segmenter or detector, photographs of any size, and give answers in their pixels.
        opset: of ONNX, one of `onnx.OPSETS`.
        compile: of "torch": an AOTInductor package, machine code for machines like this one.
        device: of "torch": "cpu" (if None) or "cuda", for which the program is made, and on which it is verified.
        vendor: of "web": put onnxruntime-web beside the page, fetched by npm if True, else out of this folder of its
            unpacked npm package.
        calibration_dataset: images for int8, and to compare on in any precision; folder, Parquet files or Hub id. With
            labels, the accuracy is reported, too.
        calibration_config_name, calibration_split, image_column_name: which of the dataset's images; found if None.
        calibration_size, verification_size: how many images to calibrate on, and how many others to compare on.
        revision, token, cache_dir, trust_remote_code: for loading the model; token and cache also for the dataset.
        overwrite: replace an export that lies at `output`.
        progress: told what happens next.

    Raises:
        UserError: no such model, a combination that there is not, no images, or an export that is not what the model
            is. Nothing is left behind.
    """
    calibrated = calibration_dataset is not None
    if precision is None:
        precision = FORMATS[format].default_precision(calibrated) if format in FORMATS else "float32"
    options = check_request(
        format, precision, calibrated=calibrated, opset=opset, compile=compile, device=device, vendor=vendor
    )
    target = FORMATS[format]
    if calibration_size < 1 or verification_size < 1:
        raise UserError(
            "--calibration_size and --verification_size must be positive, not "
            f"{calibration_size} and {verification_size}"
        )
    check_output(Path(output), overwrite)
    progress("loading")
    origin = Origin(revision, token, cache_dir, trust_remote_code)
    original, processor, task = load_source(os.fspath(model), origin, target, precision)
    objects = TASKS[task].gives == "objects"
    if target.whole:
        preprocessing = True
        target.check_model(os.fspath(model), original, processor, TASKS[task].gives)
        dynamic_size = target.takes_sizes(processor, dynamic_size)
        progress("fetching what lies beside the graph")
        gathered = target.gather(precision, **options)
    resizes = preprocessing and (objects or TASKS[task].gives == "map")
    dynamic_size = takes_any_size(os.fspath(model), original, processor, target, task, resizes, dynamic_size)
    kind = kind_of(original.config, task)
    manifest = Manifest(
        format=format,
        precision=precision,
        task=task,
        file=target.file,
        preprocessing=preprocessing,
        input="pixel_values",
        output="logits",
        image_size=list(image_size_of(original, processor)),
        dynamic_size=dynamic_size,
        resizes=resizes,
        least_size=1 if resizes else smallest_size(original.config),
        most_images=target.most_images,
        num_channels=original.config.num_channels,
        problem_type=original.config.problem_type,
        label_thresholds=getattr(original.config, "label_thresholds", None),
        compiled=options.get("compile", False),
        device=options.get("device", "cpu"),
        opset=options.get("opset"),
        source=describe_source(os.fspath(model), revision, original),
        versions={
            "hf-poolformer": __version__,
            **versions_of(("torch", "transformers", *target.libraries_for(precision))),
        },
    )
    if manifest.dynamic_size and target.sizes == "limited":
        manifest.most_size = largest_size(original.config, manifest.image_size)
    progress("reading images")
    how = {
        "config_name": calibration_config_name,
        "split": calibration_split,
        "image_column_name": image_column_name,
        "token": token,
        "cache_dir": cache_dir,
    }
    images = photographs_to_compare(calibration_dataset, processor, manifest, min(verification_size, MAPS), how)
    sizes = calibration_size if precision == "int8" else 0, 0 if images else verification_size
    calibration, comparisons = samples(calibration_dataset, processor, original.config, manifest, sizes, how)
    with new_folder(output, overwrite) as folder:
        progress("writing the graph")
        inside = processor if preprocessing else None
        folded = fold(original)
        target.adapt(folded, precision)
        module = deployable(folded, DTYPES[target.dtype(precision)], inside, task)
        manifest.output = module.output_name
        if objects:
            manifest.further_inputs, manifest.further_outputs = module.further_inputs, module.further_outputs
        path = write_graph(module, folder, manifest)
        for name, part in zip(SETTINGS, (original.config, processor), strict=True):
            # Without the code that would come along: there is no PyTorch model here for it to be of use to.
            facts = json.loads(part.to_json_string())
            write_json(folder / name, {key: value for key, value in facts.items() if key != "auto_map"})
        if precision == "int8":
            manifest.quantisation = quantise_graph(path, manifest, original, processor, calibration, kind, progress)
        if target.whole:
            spread = functools.partial(spread_of, original, comparisons[0].pixel_values)
            target.finish(folder, manifest, processor, original.config, spread, gathered)
        manifest.computed_by = target.computed_by(path)
        manifest.files = files_of(folder, path)
        manifest.write(folder)
        exported, emulated = load(folder, trust_remote_code=True), None
        elsewhere = target.arithmetic_elsewhere(precision)
        if elsewhere is not None:
            run = deployable(fold(original), DTYPES[elsewhere], inside, task).eval()
            emulated = ExportedModel(run, manifest, original.config, image_processor_of(manifest, processor))
        common = {"arithmetic": target.arithmetic(precision), "emulated": emulated, "progress": progress}
        if objects:
            report = verify_objects(exported, original, processor, images, **common)
        elif resizes:
            report = verify_maps(exported, original, processor, images, **common)
        else:
            report = verify(exported, original, comparisons, **common)
        if target.whole:
            progress("comparing on images of odd sizes")
            verify_images(report, exported, original, odd_images(gives_one_size(processor)), processor)
        report.size = folder_size(folder)
        write_json(folder / REPORT, report.to_dict())
        (folder / "README.md").write_text(export_card(manifest, report, original.config), encoding="utf-8")
        size = folder_size(folder)
    return Summary(Path(output), manifest, report, size)


def deployable(model: nn.Module, dtype: torch.dtype, processor: Any, task: str) -> nn.Module:
    """A folded model with what surrounds it in the graph; `processor` where its work is part of that."""
    if TASKS[task].gives == "objects":
        from .detection import DetectorDeployable

        return DetectorDeployable(model, dtype, processor)
    if TASKS[task].gives == "map" and processor is not None:
        from .photographs import MapDeployable

        return MapDeployable(model, dtype, processor)
    return Deployable(model, dtype, processor)


def takes_any_size(
    name: str,
    model: nn.Module,
    processor: Any,
    target: ExportFormat,
    task: str,
    resizes: bool,
    asked: bool | None,
) -> bool:
    """
    Whether the graph takes images of all sizes, if that is `asked`, and otherwise as model and format allow.

    Args:
        name: of the model.
        resizes: the graph is to take photographs, and to answer in their pixels.

    Raises:
        UserError: model, image processor or format cannot do what is asked.
    """
    fixed, gives = has_fixed_tokens(model), TASKS[task].gives
    mixers = f"{name} mixes a fixed number of tokens (token_mixers {', '.join(model.config.token_mixers)})"
    if gives != "objects" and not resizes:
        if asked and fixed:
            raise UserError(f"{mixers}, so it takes images of one size only: leave --dynamic_size out")
        if asked and target.sizes == "one":
            raise UserError(f"--format {target.name} is written for images of one size: leave --dynamic_size out")
        # A segmenter's processor gives images of any sides.
        vary = target.sizes == "any" or (target.sizes == "limited" and gives == "map")
        return vary and not fixed if asked is None else asked
    if target.sizes != "any":
        able = [f"--format {row.name}" for row in FORMATS.values() if row.sizes == "any" and not row.whole]
        raise UserError(
            f"--format {target.name} is written for images of one size, and with --preprocessing a segmenter takes "
            f"photographs of any: leave --preprocessing out, or take {' or '.join(able)}"
        )
    if asked is False:
        raise UserError(f"{name} is exported for images of any size: leave --dynamic_size out")
    if resizes:
        check_processor(name, processor)
    if fixed and not (resizes and fixed_size(processor)):
        raise UserError(
            f"{mixers}, so it takes images of one size only: a graph with --preprocessing and an image processor that "
            "resizes to one height and width could serve it, no other"
        )
    return True


def photographs_to_compare(
    location: str | None, processor: Any, manifest: Manifest, count: int, how: dict[str, Any]
) -> list[Any]:
    """Images as they were stored, of odd sizes, and of a dataset; none for graphs that are compared on batches."""
    if not manifest.resizes and TASKS[manifest.task].gives != "objects":
        return []
    images = odd_photographs(manifest.num_channels)
    if location is not None:
        images += read_photographs(location, channels_of(processor), manifest.num_channels, count, **how)
    return images


def samples(
    location: str | None,
    processor: Any,
    config: Any,
    manifest: Manifest,
    sizes: tuple[int, int],
    how: dict[str, Any],
) -> tuple[Sample | None, list[Sample]]:
    """
    Batches to calibrate on, and to compare on.

    Args:
        sizes: how many images to calibrate on, and to compare on; 0 where nothing asks for them.
    """
    if not any(sizes):
        return None, []
    if location is None:
        return None, [sample_photographs(processor, PHOTOGRAPHS, manifest.num_channels)]
    calibration, comparison = read_samples(
        location,
        cropping(processor) if TASKS[manifest.task].is_dense else processor,
        config,
        (max(sizes[0], 1), max(sizes[1], 1)),
        **how,
    )
    comparisons = [comparison]
    if sizes[1] and len(comparison.pixel_values) < FEWEST:
        comparisons.insert(0, sample_photographs(processor, PHOTOGRAPHS, manifest.num_channels))
    return calibration, comparisons


def load_source(name: str, origin: Origin, target: Any, precision: str) -> tuple[nn.Module, Any, str]:
    """
    Model in inference mode, image processor, and task.

    Args:
        target: the format that it is to be exported to.

    Raises:
        UserError: no such model, none that can be exported, or one without trained, finite weights.
    """
    task = task_of_checkpoint(name, origin)
    if task.gives == "objects" and precision not in target.detector_precisions:
        there = [f"--format {row.name}" for row in FORMATS.values() if row.detector_precisions]
        ways = [way for way in PRECISIONS if any(way in row.detector_precisions for row in FORMATS.values())]
        raise UserError(
            f"{name} is a detector, which --format {target.name} --precision {precision} cannot hold: it ends in "
            f"steps whose number depends on the image (non-maximum suppression). {' and '.join(there)} can, in "
            f"{' and '.join(ways)}"
        )
    model, processor = load_trained(name, origin, task)
    if task.gives == "scores":
        check_choice(model.config)
    check_channels(name, processor, getattr(model.config, "num_channels", 3))
    return model.float().eval(), processor, task.name


@torch.inference_mode()
def spread_of(model: nn.Module, pixel_values: torch.Tensor) -> torch.Tensor:
    """Standard deviation of each output over images, (outputs,)."""
    return model(pixel_values[:PHOTOGRAPHS]).logits.std(0, correction=0)


def quantise_graph(
    path: Path,
    manifest: Manifest,
    model: nn.Module,
    processor: Any,
    sample: Sample,
    kind: str,
    progress: Callable[[str], None],
) -> dict[str, Any]:
    # What lies at `path` may be a scratch that no runtime opens.
    inputs = ExportedModel(nn.Identity(), manifest, model.config, processor).prepare(sample.pixel_values)
    resizing = 2 if manifest.resizes else 0  # matrix products, the graph's first
    pixel_values = sample.pixel_values[: MAPS if kind == "pixels" else None]
    with torch.inference_mode():
        right = torch.cat([model(chunk).logits for chunk in pixel_values.split(16)])

    def evaluate(graph: Path) -> Quality:
        exported = ExportedModel(Graph(graph, manifest), manifest, model.config, processor)
        if manifest.resizes:
            from .dense_verification import map_quality

            return map_quality(torch.cat([exported(chunk).segmentation for chunk in pixel_values.split(4)]), right)
        got = torch.cat([exported(chunk).logits for chunk in pixel_values.split(16)])
        check, agreement = Comparison(exported, right)(got, right, sample.name)
        if kind == "numbers":  # which have no choice to agree on: the share of their variance that is left
            agreement = 1 - check.error**2
        return Quality(agreement, check.error, check.passed)

    attention = any(isinstance(module, Attention) for module in model.modules())
    # A head of numbers or labels decides nothing by being larger than another output: each of its roundings is seen.
    return quantise(
        FORMATS[manifest.format],
        path,
        inputs.numpy(),
        evaluate,
        attention=attention,
        keep_last=kind in ("numbers", "labels"),
        leave=resizing,
        progress=progress,
    )


def image_size_of(model: nn.Module, processor: Any) -> tuple[int, int]:
    """Height and width in pixels of what the image processor makes, and the model takes."""
    try:
        size = input_size(processor)
    except (TypeError, AttributeError):
        size = model.config.image_size
    return (size, size) if isinstance(size, int) else tuple(size)


def describe_source(name: str, revision: str, model: nn.Module) -> dict[str, Any]:
    """Where the weights are from, without the folders of this machine, and their SHA-256."""
    sha = hashlib.sha256()
    for key, tensor in sorted(model.state_dict().items()):
        sha.update(f"{key} {tuple(tensor.shape)}".encode())
        sha.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    local = Path(name).exists()
    source = {"model": Path(name).resolve().name if local else name, "sha256": sha.hexdigest()}
    if not local:
        source |= {"revision": revision, "commit": getattr(model.config, "_commit_hash", None)}
    return source
