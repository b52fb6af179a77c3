"""Publishing: one commit that carries a trained model's folder to the Hub, and errors a person can act on."""

import os
import shlex
from fnmatch import fnmatch
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi, get_token
from huggingface_hub.errors import (
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id


__all__ = ["PublishError", "publish"]

# What a run leaves beside the model: optimiser states, logs and the unfinished. Patterns of fnmatch, in which a star
# also crosses a slash; `hf upload --exclude` reads them the same way.
NOT_PUBLISHED = ("checkpoints/*", "logs/*", "runs/*", "*.part", "*.tmp", "*.log", ".*", "*/.*", "*__pycache__/*")

# The largest file that is searched for the token before it leaves the machine. No text file of a run is larger.
SEARCHED_BYTES = 8 * 2**20


class PublishError(RuntimeError):
    """Publishing failed. The message says why in one line and how to go on in a second; it holds no token."""


def publish(
    model_dir: str | os.PathLike,
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    revision: str | None = None,
    commit_message: str = "Upload model",
    endpoint: str | None = None,
) -> str:
    """Upload the folder of a trained model to the Hub in one commit, creating the repository if need be.

    The folder is only read. Checkpoints, logs and hidden files stay behind (`NOT_PUBLISHED`). Files that the
    repository has and the folder has not are left alone.

    Args:
        model_dir: a folder with `config.json` and weights, as written by `save_pretrained` or `scripts/train.py`.
        repo_id: `user/name` (or `name`, for the owner of the token).
        private: of a repository that is created now; None leaves it to the account's default.
        token: a Hub token with the right to write; None takes the one `hf auth login` or HF_TOKEN left.
        revision: branch to commit to, `main` by default. It is created if it does not exist.
        commit_message: first line of the commit.
        endpoint: another Hub than `HF_ENDPOINT` says.

    Returns:
        the URL of the repository.

    Raises:
        PublishError: for whatever kept the upload from happening. The folder is complete as it was.
    """
    model_dir = Path(model_dir)
    _check_folder(model_dir)
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not a repository id, which looks like user/name: {error}") from None

    secret = token or get_token()
    files = _files_to_publish(model_dir)
    _refuse_token_inside(model_dir, files, secret)
    api = HfApi(endpoint=endpoint, token=token)
    try:
        repo_url = api.create_repo(repo_id, private=private, exist_ok=True)
        repo_id = repo_url.repo_id
        if revision not in (None, "main"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        # create_commit and not upload_folder: the latter cuts a folder into several commits when it likes, and
        # between two of them the repository would hold half a model.
        api.create_commit(
            repo_id,
            [CommitOperationAdd(path_in_repo=name, path_or_fileobj=str(model_dir / name)) for name in files],
            commit_message=commit_message,
            revision=revision,
        )
    except Exception as error:  # the Hub, the network, the disk or the storage client: all end in the same advice
        reason = _redact(_reason(error, repo_id, api.endpoint), secret)
        command = retry_command(model_dir, repo_id, private=private, revision=revision)
        # `from None`: a server may echo what it was sent, and a traceback would print the original message.
        raise PublishError(
            f"the model was not published to {repo_id}: {reason} It is complete in {model_dir}.\nTo go on: {command}"
        ) from None
    return str(repo_url)


def retry_command(
    model_dir: str | os.PathLike, repo_id: str, *, private: bool | None = None, revision: str | None = None
) -> str:
    """The shell command, of huggingface_hub's own `hf`, that uploads what `publish` uploads. It holds no token."""
    words = ["hf", "upload", repo_id, str(model_dir), "."]
    names = _files_in(Path(model_dir))
    for pattern in NOT_PUBLISHED:
        if any(fnmatch(name, pattern) for name in names):  # the others would only make the line long
            words += ["--exclude", pattern]
    if private:
        words.append("--private")
    if revision:
        words += ["--revision", revision]
    return shlex.join(words)


def _check_folder(model_dir: Path) -> None:
    if not model_dir.is_dir():
        raise PublishError(f"{model_dir} is not a folder")
    if not (model_dir / "config.json").is_file() or not any(model_dir.glob("*.safetensors")):
        raise PublishError(f"{model_dir} holds no model: config.json and model.safetensors are needed")


def _files_in(model_dir: Path) -> list[str]:
    return sorted(path.relative_to(model_dir).as_posix() for path in model_dir.rglob("*") if path.is_file())


def _files_to_publish(model_dir: Path) -> list[str]:
    return [name for name in _files_in(model_dir) if not any(fnmatch(name, pattern) for pattern in NOT_PUBLISHED)]


def _refuse_token_inside(model_dir: Path, files: list[str], secret: str | None) -> None:
    """A token in a published file is a token in everybody's hands: better not to publish at all."""
    if not secret:
        return
    for name in files:
        path = model_dir / name
        if path.stat().st_size <= SEARCHED_BYTES and secret.encode() in path.read_bytes():
            raise PublishError(f"{path} contains your Hub token; remove it there, then publish again")


def _redact(text: str, secret: str | None) -> str:
    return text.replace(secret, "<token>") if secret else text


def _reason(error: Exception, repo_id: str, endpoint: str) -> str:
    """One sentence about `error`, with what to do about it."""
    if isinstance(error, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE is set, so nothing may be sent; unset it."
    if isinstance(error, LocalTokenNotFoundError):
        return "there is no Hub token; run `hf auth login` or set HF_TOKEN."
    if isinstance(error, HfHubHTTPError):
        status = error.response.status_code
        if status == 401:
            return "the Hub does not accept the token (401); run `hf auth login` with a token that may write."
        if isinstance(error, RevisionNotFoundError):
            return "the branch does not exist (404)."
        if isinstance(error, RepositoryNotFoundError) or status == 404:
            return f"{endpoint} knows no such repository, or the token may not see it (404)."
        advice = {
            402: "the account's plan does not allow it",
            403: "the token has no right to write there; check the owner's name and the token's permissions",
            409: "somebody else is changing the repository; try again",
            412: "the repository changed meanwhile; try again",
            413: "a file is too large for the Hub",
            429: "too many requests; wait a few minutes",
        }.get(status, "the Hub has a fault; try again later" if status >= 500 else "the Hub refused the request")
        said = " ".join((error.server_message or "").split())
        return f"{advice} ({status}{': ' + said if said else ''})."
    said = " ".join(str(error).split())[:300]
    if isinstance(error, ValueError) and "metadata" in said:
        return f"the Hub refuses the model card: {said}"
    return f"{endpoint} cannot be reached or broke off ({type(error).__name__}{': ' + said if said else ''})."
