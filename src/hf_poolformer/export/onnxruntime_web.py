"""onnxruntime-web, which runs a model in a browser: one version, every file of it by its hash."""

from __future__ import annotations

import base64
import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from pathlib import Path

from ..foundation.errors import UserError, one_line


VERSION = "1.30.0"
PACKAGE = f"onnxruntime-web@{VERSION}"
# Where the page takes the files from if they do not lie beside it.
CDN = f"https://cdn.jsdelivr.net/npm/{PACKAGE}/dist/"
# Where they lie beside it.
FOLDER = "vendor/"

# Of the package as npm sends it.
SHA512 = "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
# Per way of computing: the module, the one that starts WebAssembly, and the machine code.
WAYS = {
    "wasm": ("ort.wasm.min.mjs", "ort-wasm-simd-threaded.mjs", "ort-wasm-simd-threaded.wasm"),
    "webgpu": ("ort.webgpu.min.mjs", "ort-wasm-simd-threaded.asyncify.mjs", "ort-wasm-simd-threaded.asyncify.wasm"),
}
SHA384 = {
    "ort.wasm.min.mjs": "SfFfy/pvthiOsgaw3KX0bV5TfQ6Iq+oY9KutMe4SxIuHH4cl+DCSD4rTsYOoG1tJ",
    "ort-wasm-simd-threaded.mjs": "XcXA/MtAf0WpB8e023xQH9CM7RIjiugakT7x99DIwpFf7k56BIFFcAPerIF7FDad",
    "ort-wasm-simd-threaded.wasm": "vjBJ1z7qrhkTyYsNqKeF6c7N+nOJSU94czEo+tvZcu8G75JparGq9kB+kTnEUNVM",
    "ort.webgpu.min.mjs": "FPQBMbud8ICuP0Ii+Gr95KWEX9pKHtUC3lacIp0aPI8WYluKvTsEGQ3AE2Ze3QlL",
    "ort-wasm-simd-threaded.asyncify.mjs": "qViEcCGzsR/m8nlQwIsbYh7afN4thuraqFYDQY6huvmoLVoZq/eYawQ1wrv8nnhA",
    "ort-wasm-simd-threaded.asyncify.wasm": "EPVDLTxuO663dkZO/pcKJF6vOyyfq/5z9FY1oksN0UWFX2ABH4wDDZQHeNoUleWR",
}

LICENCE = """\
onnxruntime-web {version}, files of its npm package, unchanged.

MIT License

Copyright (c) Microsoft Corporation

Permission is hereby granted, free of charge, to any person obtaining a copy
of this software and associated documentation files (the "Software"), to deal
in the Software without restriction, including without limitation the rights
to use, copy, modify, merge, publish, distribute, sublicense, and/or sell
copies of the Software, and to permit persons to whom the Software is
furnished to do so, subject to the following conditions:

The above copyright notice and this permission notice shall be included in all
copies or substantial portions of the Software.

THE SOFTWARE IS PROVIDED "AS IS", WITHOUT WARRANTY OF ANY KIND, EXPRESS OR
IMPLIED, INCLUDING BUT NOT LIMITED TO THE WARRANTIES OF MERCHANTABILITY,
FITNESS FOR A PARTICULAR PURPOSE AND NONINFRINGEMENT. IN NO EVENT SHALL THE
AUTHORS OR COPYRIGHT HOLDERS BE LIABLE FOR ANY CLAIM, DAMAGES OR OTHER
LIABILITY, WHETHER IN AN ACTION OF CONTRACT, TORT OR OTHERWISE, ARISING FROM,
OUT OF OR IN CONNECTION WITH THE SOFTWARE OR THE USE OR OTHER DEALINGS IN THE
SOFTWARE.
"""


def files_of(ways: tuple[str, ...]) -> list[str]:
    return [name for way in ways for name in WAYS[way]]


def integrity_of(content: bytes) -> str:
    """The hash of a file as browsers take it."""
    return f"sha384-{base64.b64encode(hashlib.sha384(content).digest()).decode()}"


def gather(place: str | os.PathLike | bool, ways: tuple[str, ...]) -> dict[str, bytes]:
    """
    The files of the package, by name.

    Args:
        place: a folder of the unpacked package, or the package as npm packs it; True lets npm fetch it.
        ways: of WAYS, for which they are.

    Raises:
        UserError: they are not there, or are others than those known here.
    """
    if place is True:
        with tempfile.TemporaryDirectory(prefix="hf-poolformer-") as scratch:
            return unpacked(fetch(Path(scratch)), ways)
    path = Path(place)
    if path.is_file():
        return unpacked(path, ways)
    if not path.is_dir():
        raise UserError(f"--vendor {path}: there is no such folder; `npm pack {PACKAGE}` writes a file that does, too")
    found = {}
    for name in files_of(ways):
        file = next((place / name for place in (path / "dist", path) if (place / name).is_file()), None)
        if file is None:
            raise UserError(f"--vendor {path} has no {name}: it must be the unpacked npm package {PACKAGE}")
        found[name] = checked(name, file.read_bytes(), str(file))
    return found


def fetch(scratch: Path) -> Path:
    """The package, by npm, which knows the registry, the proxy and the certificates to use."""
    advice = f"without a network, --vendor FOLDER takes the unpacked npm package {PACKAGE}"
    npm = shutil.which("npm")
    if npm is None:
        raise UserError(f"--vendor fetches {PACKAGE} by npm, which is not installed; {advice}")
    try:
        done = subprocess.run(
            [npm, "pack", PACKAGE, "--pack-destination", str(scratch), "--silent", "--fetch-retries", "1"],
            cwd=scratch,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=600,
        )
    except subprocess.TimeoutExpired:
        raise UserError(f"npm did not fetch {PACKAGE} in ten minutes; {advice}") from None
    packed = list(scratch.glob("*.tgz"))
    if done.returncode or len(packed) != 1:
        said = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        why = one_line(said[0])[:200] if said else "npm does not say why"
        raise UserError(f"npm could not fetch {PACKAGE} ({why}); {advice}")
    return packed[0]


def unpacked(package: Path, ways: tuple[str, ...]) -> dict[str, bytes]:
    content = package.read_bytes()
    if base64.b64encode(hashlib.sha512(content).digest()).decode() != SHA512:
        raise UserError(
            f"{package.name} is not {PACKAGE} as it was published: its SHA-512 is another. Nothing of it is used"
        )
    with tarfile.open(package) as archive:
        return {
            name: checked(name, archive.extractfile(f"package/dist/{name}").read(), package.name)
            for name in files_of(ways)
        }


def checked(name: str, content: bytes, where: str) -> bytes:
    if integrity_of(content) != f"sha384-{SHA384[name]}":
        raise UserError(f"{where} is not {name} of {PACKAGE}: its hash is another. Nothing of it is used")
    return content
