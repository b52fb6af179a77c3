"""`export_model`: from a trained model to a verified folder that needs no PyTorch to be used."""

from __future__ import annotations

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
from ..foundation.errors import UserError
from ..foundation.files import write_json
from ..foundation.loading import load_trained, task_of_checkpoint
from ..foundation.machine import versions_of
from ..foundation.origin import Origin
from ..foundation.scores import check_choice
from ..token_mixers import Attention
from .card import export_card
from .deployable import DTYPES, Deployable, has_fixed_tokens, largest_size, smallest_size, write_graph
from .folder import REPORT, SETTINGS, Manifest, check_output, files_of, folder_size, new_folder
from .formats import FORMATS, check_request
from .graph import fold
from .images import Sample, check_channels, read_samples, sample_photographs
from .quantisation import Quality, quantise
from .runtime import ExportedModel, Graph, load
from .verification import FEWEST, Comparison, Report, kind_of, verify


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
        if report.accuracy is not None:
            lines.append(f"accuracy {report.accuracy:.2%}, of the model {report.accuracy_before:.2%}")
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
    precision: str = "float32",
    dynamic_size: bool | None = None,
    preprocessing: bool = False,
    opset: int | None = None,
    compile: bool = False,
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
        model: folder or Hub id of an image classifier or a semantic segmenter.
        format: one of `formats.FORMATS`: "onnx", "openvino", "torch" (a program of `torch.export`), "executorch" or
            "coreml".
        precision: "float32"; "float16" (OpenVINO: of the weights in the file, computed in float32; not ExecuTorch);
            "bfloat16" (OpenVINO and torch); "int8" (ONNX, OpenVINO and ExecuTorch), which needs `calibration_dataset`.
        dynamic_size: whether images of other sizes than the model's are taken; None where the family allows it and
            the format is not made for one size (`ExportFormat.sizes`).
        preprocessing: take uint8 (batch, height, width, channels), resized and cropped, and give probabilities.
        opset: of ONNX, one of `onnx.OPSETS`.
        compile: of "torch": an AOTInductor package, machine code for machines like this one.
        calibration_dataset: images for int8, and to compare on in any precision; folder, Parquet files or Hub id. With
            labels, the accuracy is reported, too.
        calibration_size, verification_size: how many images to calibrate on, and how many others to compare on.
        revision, token, cache_dir, trust_remote_code: for loading the model; token and cache also for the dataset.
        overwrite: replace an export that lies at `output`.
        progress: told what happens next.

    Raises:
        UserError: no such model, a combination that there is not, no images, or an export that is not what the model
            is. Nothing is left behind.
    """
    options = check_request(
        format, precision, calibrated=calibration_dataset is not None, opset=opset, compile=compile
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
    original, processor, task = load_source(os.fspath(model), origin)
    fixed = has_fixed_tokens(original)
    if dynamic_size and fixed:
        raise UserError(
            f"{model} mixes a fixed number of tokens (token_mixers {', '.join(original.config.token_mixers)}), so it "
            "takes images of one size only: leave --dynamic_size out"
        )
    if dynamic_size and target.sizes == "one":
        raise UserError(f"--format {format} is written for images of one size: leave --dynamic_size out")
    kind = kind_of(original.config, task)
    # A segmenter's processor gives images of any sides.
    sizes_vary = target.sizes == "any" or (target.sizes == "limited" and kind == "pixels")
    manifest = Manifest(
        format=format,
        precision=precision,
        task=task,
        file=target.file,
        preprocessing=preprocessing,
        input="pixel_values",
        output="logits",
        image_size=list(image_size_of(original, processor)),
        dynamic_size=sizes_vary and not fixed if dynamic_size is None else dynamic_size,
        least_size=smallest_size(original.config),
        most_images=target.most_images,
        num_channels=original.config.num_channels,
        problem_type=original.config.problem_type,
        label_thresholds=getattr(original.config, "label_thresholds", None),
        compiled=options.get("compile", False),
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
    if calibration_dataset is None:
        calibration, comparison = None, sample_photographs(processor, PHOTOGRAPHS, manifest.num_channels)
    else:
        calibration, comparison = read_samples(
            calibration_dataset,
            processor,
            original.config,
            (calibration_size if precision == "int8" else 1, verification_size),
            config_name=calibration_config_name,
            split=calibration_split,
            image_column_name=image_column_name,
            token=token,
            cache_dir=cache_dir,
        )
    comparisons = [comparison]
    if len(comparison.pixel_values) < FEWEST:
        comparisons.insert(0, sample_photographs(processor, PHOTOGRAPHS, manifest.num_channels))
    with new_folder(output, overwrite) as folder:
        progress("writing the graph")
        inside = processor if preprocessing else None
        folded = fold(original)
        target.adapt(folded, precision)
        module = Deployable(folded, DTYPES[target.dtype(precision)], inside)
        manifest.output = module.output_name
        path = write_graph(module, folder, manifest)
        for name, part in zip(SETTINGS, (original.config, processor), strict=True):
            # Without the code that would come along: there is no PyTorch model here for it to be of use to.
            facts = json.loads(part.to_json_string())
            write_json(folder / name, {key: value for key, value in facts.items() if key != "auto_map"})
        if precision == "int8":
            manifest.quantisation = quantise_graph(path, manifest, original, processor, calibration, kind, progress)
        manifest.computed_by = target.computed_by(path)
        manifest.files = files_of(folder, path)
        manifest.write(folder)
        exported, emulated = load(folder, trust_remote_code=True), None
        elsewhere = target.arithmetic_elsewhere(precision)
        if elsewhere is not None:
            run = Deployable(fold(original), DTYPES[elsewhere], inside).eval()
            emulated = ExportedModel(run, manifest, original.config, processor)
        report = verify(
            exported,
            original,
            comparisons,
            arithmetic=target.arithmetic(precision),
            emulated=emulated,
            progress=progress,
        )
        report.size = folder_size(folder)
        write_json(folder / REPORT, report.to_dict())
        (folder / "README.md").write_text(export_card(manifest, report, original.config), encoding="utf-8")
        size = folder_size(folder)
    return Summary(Path(output), manifest, report, size)


def load_source(name: str, origin: Origin) -> tuple[nn.Module, Any, str]:
    """
    Model in inference mode, image processor, and task.

    Raises:
        UserError: no such model, none that can be exported, or one without trained, finite weights.
    """
    task = task_of_checkpoint(name, origin)
    if not task.exported_output:
        raise UserError(
            f"{name} is a detector, which cannot be exported: it ends in steps whose number depends on the image "
            "(non-maximum suppression). Image classifiers and semantic segmenters can"
        )
    model, processor = load_trained(name, origin, task)
    if task.gives == "scores":
        check_choice(model.config)
    check_channels(name, processor, getattr(model.config, "num_channels", 3))
    return model.float().eval(), processor, task.name


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
    pixel_values = sample.pixel_values[: MAPS if kind == "pixels" else None]
    with torch.inference_mode():
        right = torch.cat([model(chunk).logits for chunk in pixel_values.split(16)])

    def evaluate(graph: Path) -> Quality:
        exported = ExportedModel(Graph(graph, manifest), manifest, model.config, processor)
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
        progress=progress,
    )


def image_size_of(model: nn.Module, processor: Any) -> tuple[int, int]:
    """Height and width in pixels of what the image processor makes, and the model takes."""
    from ..data.transforms import input_size

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
