"""Is what was published what was meant? Download it again, compare hashes and results, load it as a stranger, compare
logits."""

import json
import os
import subprocess
import sys
from pathlib import Path

from huggingface_hub import snapshot_download

from ..foundation.files import digest
from .contents import Contents, PublishError
from .eval_results import RESULTS, read_results, results_of_card


__all__ = ["compare_answers", "compare_files", "compare_results"]

# Outputs of the same weights by two implementations of one function, relative to the largest output.
TOLERANCE = 1e-4

HOW = {"code": "with trust_remote_code", "plain": "by transformers alone"}

# What of the environment a stranger does not have.
OURS = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HF_ENDPOINT")


def compare_files(
    contents: Contents,
    repo_id: str,
    revision: str,
    target: Path,
    *,
    token: str | None = None,
    endpoint: str | None = None,
) -> Path:
    """Download every file of `contents` at commit `revision` into `target` and compare SHA-256 with what was sent.

    Raises:
        PublishError: naming the files that came back otherwise.
    """
    folder = Path(
        snapshot_download(
            repo_id,
            repo_type=contents.repo_type,
            revision=revision,
            local_dir=target,
            allow_patterns=[glob_escape(name) for name in contents.files],
            token=token,
            endpoint=endpoint,
        )
    )
    wrong = [
        name
        for name in contents.files
        if not (folder / name).is_file() or digest(folder / name) != contents.sha256(name)
    ]
    if wrong:
        raise PublishError(f"the Hub gives back other files than were sent: {', '.join(wrong[:5])}")
    return folder


def compare_results(downloaded: Path) -> str:
    """Read the results in `.eval_results/` as the Hub does, and compare them with the model-index of the card.

    Returns:
        a sentence for people.

    Raises:
        PublishError: a value is another one there, or a result calls itself verified.
    """
    try:
        entries = read_results((downloaded / RESULTS).read_text(encoding="utf-8"), RESULTS)
        told, _ = results_of_card((downloaded / "README.md").read_text(encoding="utf-8"))
    except ValueError as error:
        raise PublishError(f"the published results cannot be read: {error}") from None
    values = {(each.entry.dataset_id, each.entry.notes): each.entry.value for each in told}
    for entry in entries:
        if values.get((entry.dataset_id, entry.notes)) != entry.value or entry.verify_token is not None:
            raise PublishError(f"{RESULTS} says {entry.value!r} of {entry.dataset_id}, and README.md something else")
    return f"{RESULTS} read back as the Hub reads it, with the values of the card"


def compare_answers(folder: Path, downloaded: Path, scratch: Path) -> str:
    """Compare the outputs of `folder`'s model, by this package, with those of `downloaded` in a process without it.

    There the model is loaded with the code that lies in the folder and, if transformers has a class of that name,
    without it.

    Returns:
        a sentence for people.

    Raises:
        PublishError: the model cannot be loaded there, or its outputs differ by more than `TOLERANCE` relative.
    """
    # torch and transformers, which an upload as such does not need.
    import transformers
    from safetensors.torch import load_file

    import hf_poolformer

    from .stranger import answers

    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    name = (config.get("architectures") or ["none"])[0]
    ways = ["code"] if "auto_map" in config else []
    if name in dir(transformers):  # not hasattr, which would import the class
        ways.append("plain")
    if not ways:
        raise PublishError(f"config.json names the class {name!r} and no code for it; save it with save_pretrained")
    bars = transformers.utils.logging.is_progress_bar_enabled()
    transformers.utils.logging.disable_progress_bar()
    try:
        expected = answers(str(folder), code=False, classes=hf_poolformer)
    finally:
        if bars:
            transformers.utils.logging.enable_progress_bar()
    path = scratch / "answers.safetensors"
    ask_a_stranger(downloaded, path, ways, scratch)
    found = load_file(path)
    worst = 0.0
    for way in ways:
        theirs = {key.removeprefix(f"{way}."): value for key, value in found.items() if key.startswith(f"{way}.")}
        if {key: value.shape for key, value in theirs.items()} != {key: v.shape for key, v in expected.items()}:
            raise PublishError(f"loaded elsewhere ({HOW[way]}), the model has outputs of other shapes")
        for key, value in expected.items():
            difference = (theirs[key] - value).abs().max().item() if value.numel() else 0.0
            difference /= max(value.abs().max().item(), 1e-6) if value.numel() else 1.0
            if not difference <= TOLERANCE:  # NaN is not
                raise PublishError(f"loaded elsewhere ({HOW[way]}), its outputs differ by {difference:.1e} relative")
            worst = max(worst, difference)
    return (
        f"the same logits where this package is missing, {' and '.join(HOW[way] for way in ways)} "
        f"(largest relative difference {worst:.1e})"
    )


def ask_a_stranger(folder: Path, path: Path, ways: list[str], scratch: Path) -> None:
    script = Path(__file__).with_name("stranger.py")
    code = (
        "import runpy, sys; sys.modules['hf_poolformer'] = None; "
        f"sys.argv[0] = {str(script)!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
    )
    environment = {key: value for key, value in os.environ.items() if key not in OURS}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(scratch / "modules"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(
        [sys.executable, "-c", code, str(folder), str(path), *ways],
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )
    if done.returncode != 0 or not path.is_file():
        last = next((line for line in reversed(done.stderr.splitlines()) if line.strip()), "no message")
        raise PublishError(f"where this package is missing the model cannot be loaded: {last[:300]}")


def glob_escape(name: str) -> str:
    """A file's name as a pattern that matches only itself."""
    return "".join(f"[{char}]" if char in "*?[" else char for char in name)
