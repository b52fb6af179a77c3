"""How a Space gets this package: from a wheel that it carries, from the package index, or from an address.

Gradio Spaces install requirements.txt before any other file of theirs is there, so that it cannot name a wheel beside
it. A Space that carries one lists there what the wheel needs, and its app.py takes the code from the wheel.
"""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from base64 import urlsafe_b64encode
from dataclasses import dataclass, field
from email.parser import Parser
from hashlib import sha256
from importlib import metadata
from pathlib import Path
from urllib.parse import urlsplit

from packaging.requirements import Requirement
from packaging.utils import InvalidWheelFilename, canonicalize_name, parse_wheel_filename

from ..foundation.errors import one_line
from .contents import PublishError


__all__ = ["INDEX", "WHEEL", "SpacePackage", "package_for_space"]

WHEEL, INDEX = "wheel", "index"
NAME = "hf-poolformer"
EXTRA = "app"
# What a wheel of ours is called, for removing the one of an earlier version.
WHEELS = "hf_poolformer-*.whl"


@dataclass(frozen=True)
class SpacePackage:
    """
    Attributes:
        requirements: lines of requirements.txt.
        wheel: name of the wheel that app.py takes the code from, if the Space carries one.
        files: that wheel.
    """

    requirements: tuple[str, ...]
    wheel: str | None = None
    files: dict[str, bytes] = field(default_factory=dict)


def package_for_space(choice: str) -> SpacePackage:
    """
    Args:
        choice: `"wheel"`, one made of the code that runs here; `"index"`; the path of a wheel; or an address that pip
            installs from, `https://.../hf_poolformer-1.0.0-py3-none-any.whl` or `git+https://...`.

    Raises:
        PublishError: it is none of these, or not to be had.
    """
    if choice == WHEEL:
        return carried(*own_wheel())
    if choice == INDEX:
        version = installed().version
        return SpacePackage((f"{NAME}[{EXTRA}]>={version}",))  # so that the Space has what its app.py needs
    if "://" in choice:
        return SpacePackage((f"{NAME}[{EXTRA}] @ {checked_address(choice)}",))
    path = Path(choice)
    if path.suffix != ".whl" or not path.is_file():
        raise PublishError(
            f"--space_package {choice} is neither {WHEEL}, {INDEX}, a wheel's path nor an address like git+https://..."
        )
    try:
        name, *_ = parse_wheel_filename(path.name)
        content = path.read_bytes()
        if name == NAME:
            return carried(path.name, content)
    except InvalidWheelFilename:
        pass
    except (OSError, zipfile.BadZipFile, zlib.error, KeyError, ValueError) as error:
        raise PublishError(f"--space_package {choice} cannot be read: {one_line(error)}") from None
    raise PublishError(f"--space_package {choice} is no wheel of {NAME}")


def carried(name: str, content: bytes) -> SpacePackage:
    """A wheel, and what it needs to show the app."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        path = next((path for path in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", path)), None)
        if path is None:
            raise zipfile.BadZipFile("it has no METADATA")
        needed = Parser().parsestr(archive.read(path).decode()).get_all("Requires-Dist", [])
    lines = []
    for requirement in map(Requirement, needed):
        if requirement.marker is None or requirement.marker.evaluate({"extra": EXTRA}):
            requirement.marker = None
            lines.append(str(requirement))
    return SpacePackage(tuple(lines), name, {name: content})


def checked_address(address: str) -> str:
    """
    Raises:
        PublishError: pip could not install it, or everybody could read a password in it.
    """
    parts = urlsplit(address)
    if parts.password or (parts.username and parts.scheme != "git+ssh"):
        raise PublishError(
            "--space_package: everybody could read the name and password in this address; leave them out"
        )
    archive = parts.scheme in ("http", "https") and parts.path.endswith((".whl", ".zip", ".tar.gz"))
    if not archive and parts.scheme not in ("git+http", "git+https", "git+ssh"):
        raise PublishError(
            f"--space_package {address}: pip installs a wheel, an archive, or a repository named as git+https://..."
        )
    return address


def installed() -> metadata.Distribution:
    try:
        return metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        raise PublishError(
            f"{NAME} is not installed but run from its source, so that nobody knows what it needs: "
            "`pip install .` there, or --space_package WHEEL"
        ) from None


def own_wheel() -> tuple[str, bytes]:
    """Name and content of a wheel of the code that runs here: the same bytes for the same code.

    Written and not built: an installed package has no source to build from.
    """
    found = installed()
    package = Path(__file__).resolve().parents[1]
    paths = [path for path in package.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    # A link to a folder, which rglob does not follow before Python 3.13.
    paths += [path for path in (package / "hub" / "model_cards").rglob("*") if path.is_file()]
    paths.append(package.with_name("hf_poolformer_cli.py"))
    files = {path.relative_to(package.parent).as_posix(): path.read_bytes() for path in paths}
    stem = f"{canonicalize_name(NAME).replace('-', '_')}-{found.version}"
    texts = {
        "METADATA": found.read_text("METADATA") or found.read_text("PKG-INFO"),  # the latter beside a source
        "WHEEL": f"Wheel-Version: 1.0\nGenerator: {NAME}\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
        "entry_points.txt": found.read_text("entry_points.txt"),
    }
    files |= {f"{stem}.dist-info/{name}": text.encode() for name, text in texts.items() if text}
    record = [f"{name},sha256={hash_of(files[name])},{len(files[name])}" for name in sorted(files)]
    files[f"{stem}.dist-info/RECORD"] = "\n".join([*record, f"{stem}.dist-info/RECORD,,", ""]).encode()
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in sorted(files):
            entry = zipfile.ZipInfo(name)  # of 1980: when a file was written here is nobody's business
            entry.external_attr = 0o100644 << 16
            entry.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(entry, files[name])
    return f"{stem}-py3-none-any.whl", target.getvalue()


def hash_of(content: bytes) -> str:
    """As RECORD has it."""
    return urlsafe_b64encode(sha256(content).digest()).rstrip(b"=").decode()
