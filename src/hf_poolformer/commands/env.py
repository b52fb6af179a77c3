"""`hf-poolformer env`: versions, devices, kernels and extras, to paste into an issue.

Holds no token, no path and no name of the machine.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Sequence
from importlib import metadata
from typing import Any

from ..foundation.machine import cores, processor_name, version_of
from ..foundation.redaction import redact
from ..foundation.strict_json import to_json
from . import CommandParser, command


# What changes what the programs do, and is nobody's secret.
VARIABLES = (
    "ACCELERATE_USE_CPU",
    "CUDA_VISIBLE_DEVICES",
    "HF_ENDPOINT",
    "HF_HUB_OFFLINE",
    "HF_POOLFORMER_KERNELS",
    "OMP_NUM_THREADS",
    "TRITON_INTERPRET",
)


def parser(prog: str | None = None) -> CommandParser:
    parser = CommandParser(prog=prog, description=__doc__.partition(": ")[2])
    parser.add_argument("--json", action="store_true", help="print it as JSON, for programs")
    return parser


@command
def main(argv: Sequence[str] | None = None, prog: str | None = None) -> int:
    """Prints what there is."""
    arguments = parser(prog).parse_args(argv)
    facts = describe_environment()
    print(to_json(facts, indent=2) if arguments.json else as_text(facts))
    return 0


def describe_environment() -> dict[str, Any]:
    """Everything, fit for JSON: system, packages, extras, devices, kernels, variables."""
    packages, extras = describe_requirements()
    return {
        "hf-poolformer": version_of("hf-poolformer") or "not installed, run from its source",
        "python": platform.python_version(),
        "system": platform.platform(),
        "packages": packages,
        "extras": extras,
        "devices": describe_devices(),
        "kernels": describe_kernels(),
        "variables": {name: redact(os.environ[name]) for name in VARIABLES if name in os.environ},
    }


def describe_requirements() -> tuple[dict[str, str | None], dict[str, str]]:
    """Versions of the libraries a plain installation has, and for each extra "installed" or what it lacks."""
    from packaging.requirements import Requirement
    from packaging.utils import canonicalize_name

    try:
        requirements = [Requirement(line) for line in metadata.requires("hf-poolformer") or []]
        known = metadata.metadata("hf-poolformer").get_all("Provides-Extra") or []
    except metadata.PackageNotFoundError:
        return {name: version_of(name) for name in ("torch", "torchvision", "transformers", "huggingface-hub")}, {}
    plain = [one for one in requirements if one.marker is None or one.marker.evaluate({"extra": ""})]
    # Metadata have names as their builder writes them.
    names = [canonicalize_name(one.name) for one in [*plain, Requirement("accelerate"), Requirement("datasets")]]
    packages = {name: version_of(name) for name in names}
    extras = {}
    for extra in known:
        lacking = [
            text
            for one in requirements
            if one.name != "hf-poolformer" and one not in plain and one.marker.evaluate({"extra": extra})
            if (text := lack(one))
        ]
        extras[extra] = f"lacks {', '.join(lacking)}" if lacking else "installed"
    return packages, extras


def lack(requirement: Any) -> str | None:
    found = version_of(requirement.name)
    if found is None:
        return requirement.name
    return None if requirement.specifier.contains(found, prereleases=True) else f"{requirement} (has {found})"


def describe_devices() -> dict[str, str]:
    """The CPU and every accelerator that PyTorch sees."""
    import torch

    devices = {
        "cpu": f"{processor_name()}, {cores()} cores, {torch.get_num_threads()} threads, "
        f"{torch.backends.cpu.get_cpu_capability()}"
    }
    for index in range(torch.cuda.device_count()):
        facts = torch.cuda.get_device_properties(index)
        runtime = f"ROCm {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
        devices[f"cuda:{index}"] = f"{facts.name}, {facts.total_memory / 2**30:.0f} GiB, {runtime}"
    if torch.backends.mps.is_available():
        devices["mps"] = "Apple GPU"
    return devices


def describe_kernels() -> dict[str, str]:
    """Who computes the blocks on each kind of device and in each precision, and why nobody faster does."""
    import torch

    kernels = {}
    for device in ("cpu", *(["cuda"] if torch.cuda.is_available() else [])):
        for dtype in (torch.float32, torch.bfloat16):
            kernels[f"{device} {str(dtype)[6:]}"] = describe_choice(
                torch.zeros(1, 8, 4, 4, device=device, dtype=dtype)
            )
    kernels["oneDNN"] = "available" if torch.backends.mkldnn.is_available() else "missing"
    return kernels


def describe_choice(x: Any) -> str:
    """Who computes the blocks of images on the device and in the precision of the tensor x, and why nobody faster."""
    import torch

    from ..backends import FEWEST_IMAGES, FEWEST_PIXELS, decide, why_not_cpu, why_not_fastest

    if x.device.type == "cuda":  # a batch for which launches do not count, whose memory is not needed
        x = x[:1, :, :1, :1].expand(FEWEST_IMAGES, x.shape[1], 1, FEWEST_PIXELS)
    try:
        with torch.no_grad():
            inference = decide(x).backend
            reason = (why_not_cpu if x.device.type == "cpu" else why_not_fastest)(x)
        training = decide(x).backend
    except (RuntimeError, ValueError) as error:  # HF_POOLFORMER_KERNELS asks for what there is not
        return str(error)
    text = f"{inference} in inference, {training} in training" + (f" ({reason})" if reason else "")
    if "triton" in (inference, training) and not reason:
        text += (
            ", plain PyTorch for smaller batches in training or of other mixers than pooling, and under torch.compile"
        )
    return text


def as_text(facts: dict[str, Any]) -> str:
    """Two columns; a dictionary's entries are indented below its name."""
    lines = []
    for name, value in facts.items():
        if not isinstance(value, dict):
            lines.append(f"{name:<18}{value}")
        elif value:
            lines += [name, *(f"  {key:<16}{text or 'not installed'}" for key, text in value.items())]
    return "\n".join(lines)
