"""The card of an exported model."""

from __future__ import annotations

from typing import Any

from huggingface_hub import ModelCardData

from ..foundation.scores import thresholds_of
from ..foundation.tasks import TASKS
from ..hub.rendering import citations_of, clean_line, plain_markdown, render_card
from .folder import Manifest
from .formats import FORMATS
from .verification import Report


OUTPUTS = {"classes": "classes", "labels": "labels", "numbers": "numbers", "pixels": "classes", "objects": "classes"}
USE = """\
{imports}
from hf_poolformer.export import load

model = load("."{trust})  # this folder; {installation}
{code}"""


def export_card(manifest: Manifest, report: Report, config: Any) -> str:
    """The facts of an export, as the one writer of cards sets them."""
    source, task, format = manifest.source, TASKS[manifest.task], FORMATS[manifest.format]
    tags = ["poolformer", "metaformer", manifest.format, manifest.precision]
    data: dict[str, Any] = {"pipeline_tag": task.pipeline_tag, "tags": list(dict.fromkeys(tags))}
    if format.hub_library is not None:
        data["library_name"] = format.hub_library
    if "/" in source["model"]:
        data |= {"base_model": source["model"], "base_model_relation": _relation(manifest)}
    rows = [
        ("format", format.description(manifest)),
        ("precision", manifest.precision),
        ("input", _input(manifest)),
        ("output", f"{_output(manifest)}, {config.num_labels} {OUTPUTS[report.kind]}, named in `config.json`"),
        *([("labels given", _thresholds(config))] if report.kind == "labels" else []),
        ("made of", _made_of(source)),
        ("size", f"{report.size / 1e6:.1f} MB; the model's weights in float32: {report.size_before / 1e6:.1f} MB"),
    ]
    if manifest.quantisation is not None:
        about = manifest.quantisation
        rows.append(
            (
                "quantisation",
                f"{about['method']} on {about['images']} images, {about['quantised_layers']} layers; "
                f"in floating point: {about['left_in_floating_point']}",
            )
        )
    rows += [
        ("arithmetic", report.arithmetic),
        ("largest difference to the model", str(report.worst)),
        ("agreement with the model", report.agreed),
    ]
    rows += report.measured
    rows.append(("versions", ", ".join(f"{name} {version}" for name, version in manifest.versions.items())))
    trust = ", trust_remote_code=True" if format.holds_code else ""
    title = clean_line(source["model"])
    verified = f"{report.rule} Every comparison is in `verification.json`, every setting in `export.json`."
    return render_card(
        ModelCardData(**data),
        complete=False,  # nobody knows the licence of what was exported
        title=f"{title}, exported",
        summary=f"The {task.noun} {plain_markdown(title)} in the form that {format.runtime} runs.",
        facts=rows,
        pipeline_snippet=USE.format(
            trust=trust, imports=task.exported_imports, code=task.exported_code, installation=format.installation
        ),
        sections=[("How it was verified", verified)],
        citations=citations_of(config.model_type),
    )


def _relation(manifest: Manifest) -> str:
    return "quantized" if manifest.precision == "int8" else "finetune"


def _input(manifest: Manifest) -> str:
    described = FORMATS[manifest.format].input_description(manifest)
    if described is not None:
        return described
    height, width = ("height", "width") if manifest.dynamic_size else manifest.image_size
    number = 1 if manifest.further_outputs else "batch"
    if manifest.resizes:
        return f"`{manifest.input}`, uint8 ({number}, {height}, {width}, {manifest.num_channels}): photographs"
    if manifest.preprocessing:
        shape = f"uint8 ({number}, {height}, {width}, {manifest.num_channels}), resized and cropped"
    else:
        shape = f"float32 ({number}, {manifest.num_channels}, {height}, {width}), normalised"
    if manifest.further_inputs:
        shape += f", and `pixel_mask`, int64 (1, {height}, {width}), both"
    return f"`{manifest.input}`, {shape} as `preprocessor_config.json` says"


def _output(manifest: Manifest) -> str:
    if manifest.resizes and not manifest.further_outputs:
        return f"`{manifest.output}`, int32 (batch, height, width), the class of each pixel"
    return ", ".join(f"`{name}`" for name in (manifest.output, *manifest.further_outputs))


def _thresholds(config: Any) -> str:
    least = thresholds_of(config)
    if len(set(least)) == 1:
        return f"those whose probability is {least[0]:g} or more"
    return f"those whose probability reaches their threshold, {min(least):g} to {max(least):g}, in `export.json`"


def _made_of(source: dict[str, Any]) -> str:
    commit = f" at {source['commit']}" if source.get("commit") else ""
    return f"{plain_markdown(source['model'])}{commit}; SHA-256 of its weights {source['sha256'][:16]}..."
