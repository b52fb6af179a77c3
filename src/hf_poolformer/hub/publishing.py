"""Publishing: one commit that carries a model's or a dataset's folder to the Hub, and errors a person can act on."""

import inspect
import os
import shlex
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from hashlib import sha1
from pathlib import Path
from typing import Any, Literal

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, get_token
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from ..foundation.redaction import redact
from ..foundation.spelling import command_words
from .contents import Contents, PublishError, collect
from .eval_results import RESULTS, choose_tasks, results_of_card, text_of
from .space_package import WHEEL, SpacePackage, package_for_space
from .spaces import STATIC, page_contents, space_contents
from .verification import compare_answers, compare_files, compare_results


__all__ = ["Publication", "PublishError", "publish", "publish_command", "upload"]

# How often a commit is begun anew because somebody else's came first (412).
ATTEMPTS = 3
# The Hub's type of the repositories of the `kernels` library.
KERNEL = "kernel"


@dataclass
class Publication:
    """What has been published. `str()` of it is the URL of the repository.

    Attributes:
        url: of the repository.
        commit: hash of the commit; of the newest one where nothing had to change.
        pull_request: URL of the pull request, if one was asked for.
        files: paths in the repository.
        size: bytes of all of them.
        notes: what was changed on the way up, and what the verification found.
        space: URL of the Space, if one was asked for.
    """

    url: str
    repo_id: str
    repo_type: str
    commit: str
    pull_request: str | None
    files: tuple[str, ...]
    size: int
    notes: list[str]
    space: str | None = None

    def __str__(self) -> str:
        return self.url


def publish(
    folder: str | os.PathLike,
    repo_id: str,
    *,
    repo_type: Literal["model", "dataset", "kernel"] = "model",
    private: bool | None = None,
    gated: Literal["auto", "manual"] | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str | None = None,
    exclude: Sequence[str] = (),
    license: str | None = None,
    max_shard_size: str | int = "5GB",
    verify: bool = True,
    space: bool | str = False,
    space_package: str = WHEEL,
    endpoint: str | None = None,
) -> Publication:
    """Upload the folder of a trained model, or of a dataset, to the Hub in one commit, and look whether it arrived.

    The repository is created if need be. The folder is only read, and may be published again at any time: what has
    arrived already is not sent twice. Checkpoints with optimiser states, pickles, trackers' logs and hidden files
    stay behind; paths of this machine are cut out of settings; a missing card is written. Files that the repository
    has and the folder has not are left alone, but for weights that would be taken for the new ones.

    Args:
        folder: a model (`config.json` and safetensors weights, as `save_pretrained` or scripts/train.py write them),
            or with `repo_type="dataset"` images in folders, Parquet files or tar shards. With `repo_type="kernel"`
            the kernels of this package are written into it first, as a repository of the `kernels` library.
        repo_id: `user/name` (or `name`, for the owner of the token).
        repo_type: what the folder holds.
        private: True makes the repository private before anything is sent, whether it is new or not. False makes a
            new one public, None leaves that to the account's default; neither changes one that exists.
        gated: people have to ask for access: granted to everybody (`"auto"`) or by you (`"manual"`).
        token: a Hub token with the right to write; None takes the one `hf auth login` or HF_TOKEN left.
        revision: branch to commit to, `main` by default; it is created if it does not exist. Kernels go by default to
            `main`, which people see, and to the branch of their version, from which the library loads them.
        create_pr: propose the commit as a pull request to `main` rather than make it.
        commit_message: first line of the commit.
        exclude: patterns (fnmatch) of files of the folder that stay behind too.
        license: a licence identifier of the Hub, for the card of a folder that has none.
        max_shard_size: weights above this size go up in several files; a number of bytes, or a text like `"5GB"`.
        verify: download what was uploaded, compare every SHA-256, and for a model also compare its outputs with
            those it gives in a process without this package.
        space: also make a Space, a page on which the model can be tried: of the model's name, or `user/name`. It
            shows what is on `main`; images in the folder's `examples/` can be clicked on there. "static": `folder` is
            a page that `export --format web` wrote, and becomes the static Space `repo_id`; nothing else is made.
        space_package: how the Space gets this package. "wheel": it carries one, made of the code that runs here;
            "index": from the package index, where this version must be by then; or the path of a wheel, or an address
            like `git+https://...`.
        endpoint: another Hub than `HF_ENDPOINT` says.

    Raises:
        PublishError: for whatever kept the upload or its verification from happening. The folder is complete as it
            was, and the message ends with the command that goes on.
    """
    folder = Path(folder)
    check_repo_id(repo_id)
    if create_pr and revision not in (None, "main"):
        raise PublishError("a pull request goes to main; give either --create_pr or --revision")
    page = space == STATIC
    if page and (repo_type != "model" or gated):
        raise PublishError("--space static makes a Space, which has no --repo_type and no --gated: leave them out")
    if space and not page and (repo_type != "model" or create_pr or revision not in (None, "main")):
        raise PublishError("--space shows a model that is on main: publish one there, without --create_pr")
    if isinstance(space, str):
        check_repo_id(space)
    package = package_of(space, space_package)
    if repo_type == KERNEL and (gated or create_pr or exclude):
        raise PublishError("kernels are published as they are built: leave out --gated, --create_pr and --exclude")
    secret, branches = token or get_token(), (revision,)
    with tempfile.TemporaryDirectory(prefix="hf-poolformer-") as scratch:
        if page:
            contents = page_contents(folder, repo_id, exclude=exclude, license=license, secret=secret)
        elif repo_type == KERNEL:
            from .kernel_repository import VERSION, kernel_contents  # torch, which an upload as such does not need

            contents = kernel_contents(folder, repo_id)
            branches = branches if revision else ("main", f"v{VERSION}")
        else:
            contents = collect(
                folder,
                repo_id,
                scratch,
                repo_type=repo_type,
                exclude=exclude,
                max_shard_size=max_shard_size,
                license=license,
                secret=secret,
            )
        what = "page" if page else repo_type
        published, failure = None, None
        try:
            name_results(contents, HfApi(endpoint=endpoint, token=token), repo_id, private)
            for branch in branches:
                published = upload(
                    contents,
                    repo_id,
                    private=private,
                    gated=gated,
                    token=token,
                    revision=branch,
                    create_pr=create_pr,
                    commit_message=commit_message or f"Upload {what}",
                    endpoint=endpoint,
                    space_sdk=STATIC if page else None,
                )
            if verify:
                published.notes += verification(contents, published, folder, Path(scratch), token, endpoint)
            if package is not None:
                published.space = upload_space(
                    contents,
                    published.repo_id,
                    package,
                    space if isinstance(space, str) else published.repo_id,
                    private=private,
                    token=token,
                    verify=verify,
                    scratch=Path(scratch),
                    endpoint=endpoint,
                )
                if private or gated:
                    published.notes.append(
                        "the Space needs the secret HF_TOKEN, of a token that may read the model (in its settings)"
                    )
        except Exception as error:  # the Hub, the network, the disk or the storage client: all end in the same advice
            failure = explanation(error, endpoint or HfApi().endpoint)
    if failure is not None:
        # Raised here and not above: a server may echo what it was sent, and the first exception would hang on this
        # one as its context, for every log that writes contexts out.
        command = publish_command(
            folder,
            repo_id,
            repo_type=repo_type,
            private=private,
            gated=gated,
            revision=revision,
            create_pr=create_pr,
            commit_message=commit_message,
            exclude=exclude,
            license=license,
            max_shard_size=max_shard_size,
            verify=verify,
            space=space,
            space_package=space_package,
        )
        what = f"the {what} was not published to {repo_id}" if published is None else f"published to {published}, but"
        text = f"{what}: {failure} It is complete in {folder}." if published is None else f"{what} {failure}"
        raise PublishError(f"{redact(text, [secret])}\nTo go on: {command}")
    return published


def check_repo_id(repo_id: str) -> None:
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise PublishError(f"{repo_id!r} is not a repository id, which looks like user/name: {error}") from None


def package_of(space: bool | str, space_package: str) -> SpacePackage | None:
    """How the Space of a model gets this package; None if no such Space is made.

    Raises:
        PublishError: it is not to be had that way, or nobody would ask for it.
    """
    if space and space != STATIC:
        return package_for_space(space_package)
    if space_package != WHEEL:
        raise PublishError("--space_package says how the Space of a model gets this package, and goes with --space")
    return None


def name_results(contents: Contents, api: HfApi, repo_id: str, private: bool | None) -> None:
    """Gives the results in `.eval_results/` the ids that the Hub has for their tasks, or leaves them out."""
    if RESULTS not in contents.files:
        return
    try:
        public = not (private or api.model_info(repo_id).private)
    except RepositoryNotFoundError:
        public = True  # or not: that is up to the account, of which nothing is known here
    measured, _ = results_of_card(contents.text("README.md"))
    entries, notes = choose_tasks(measured, api, public=public)
    contents.notes += notes
    del contents.files[RESULTS]
    if entries:
        contents.files[RESULTS] = text_of(entries).encode()


def upload_space(
    model: Contents,
    model_id: str,
    package: SpacePackage,
    repo_id: str,
    *,
    private: bool | None,
    token: str | None,
    verify: bool,
    scratch: Path,
    endpoint: str | None,
) -> str:
    """Make the Space `repo_id` of a model that has been published as `model_id`; its URL."""
    contents = space_contents(model, model_id, package)
    published = upload(
        contents,
        repo_id,
        private=private,
        token=token,
        commit_message=f"Page for {model_id}",
        endpoint=endpoint,
        space_sdk="gradio",
    )
    if verify:
        target = scratch / "downloaded-space"
        compare_files(contents, published.repo_id, published.commit, target, token=token, endpoint=endpoint)
    return published.url


def upload(
    contents: Contents,
    repo_id: str,
    *,
    private: bool | None = None,
    gated: Literal["auto", "manual"] | None = None,
    token: str | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    commit_message: str = "Upload",
    endpoint: str | None = None,
    space_sdk: str | None = None,
) -> Publication:
    """Create the repository if need be and put `contents` into it with one commit. The parts of `publish` that send.

    Every step may be repeated: a repository, branch, setting or stored file that is there already stays, and a
    commit or pull request that would change nothing is not made. Arguments as for `publish`.

    Raises:
        huggingface_hub's errors, unexplained.
    """
    api = HfApi(endpoint=endpoint, token=token)
    kind = contents.repo_type
    try:
        # Without a namespace, a repository of that name may be somebody else's.
        info = api.repo_info(repo_id, repo_type=kind) if "/" in repo_id else None
    except RepositoryNotFoundError:
        info = None
    if info is None:
        created = api.create_repo(repo_id, repo_type=kind, private=private, exist_ok=True, space_sdk=space_sdk)
        repo_id = created.repo_id
        info = api.repo_info(repo_id, repo_type=kind)
    # Before anything is sent: what is meant to be private must not be public for a minute.
    if private and not info.private:
        api.update_repo_settings(repo_id, repo_type=kind, private=True)
    if gated is not None and getattr(info, "gated", False) != gated:
        api.update_repo_settings(repo_id, repo_type=kind, gated=gated)
    revision = revision or "main"
    if revision != "main" and not revision.startswith("refs/"):
        api.create_branch(repo_id, repo_type=kind, branch=revision, exist_ok=True)
    commit, pull_request = None, None
    if create_pr:
        commit, pull_request = open_request(api, contents, repo_id, commit_message)
    if commit is None:
        made = make_commit(api, contents, repo_id, revision, create_pr, commit_message)
        commit, pull_request = made.oid, made.pr_url
    notes = list(contents.notes)
    if create_pr and pull_request is None:
        notes.append("no pull request, as the repository holds these files already")
    return Publication(
        url=f"{api.endpoint}/{'' if kind == 'model' else f'{kind}s/'}{repo_id}",
        repo_id=repo_id,
        repo_type=kind,
        commit=commit,
        pull_request=pull_request,
        files=tuple(sorted(contents.files)),
        size=contents.total,
        notes=notes,
    )


def make_commit(
    api: HfApi, contents: Contents, repo_id: str, revision: str, create_pr: bool, commit_message: str
) -> CommitInfo:
    """One commit on top of what the branch holds now; begun anew if somebody else's came in between."""
    kind = contents.repo_type
    additions = [CommitOperationAdd(path_in_repo=name, path_or_fileobj=file) for name, file in contents.files.items()]
    for attempt in range(ATTEMPTS):
        head = api.repo_info(repo_id, repo_type=kind, revision=revision)
        if kind == KERNEL:  # of which the Hub does not say what is in it
            there = api.list_repo_files(repo_id, repo_type=kind, revision=head.sha)
        else:
            there = [sibling.rfilename for sibling in head.siblings or []]
        stale = [
            CommitOperationDelete(path_in_repo=name)
            for name in there
            if name not in contents.files and any(fnmatch(name, pattern) for pattern in contents.replaces)
        ]
        try:
            # create_commit and not upload_folder: the latter cuts a folder into several commits when it likes, and
            # between two of them the repository would hold half a model.
            return api.create_commit(
                repo_id,
                [*additions, *stale],
                repo_type=kind,
                revision=revision,
                create_pr=create_pr,
                commit_message=commit_message,
                parent_commit=head.sha,
            )
        except HfHubHTTPError as error:
            if error.response.status_code != 412 or attempt == ATTEMPTS - 1:
                raise
    raise AssertionError("unreachable")


def open_request(api: HfApi, contents: Contents, repo_id: str, title: str) -> tuple[str | None, str | None]:
    """Commit and URL of an open pull request of this title with just these files, left by an upload cut off."""
    requests = api.get_repo_discussions(
        repo_id, repo_type=contents.repo_type, discussion_type="pull_request", discussion_status="open"
    )
    for request in requests:
        if request.title != title:
            continue
        revision = f"refs/pr/{request.num}"
        try:
            found = api.get_paths_info(repo_id, list(contents.files), repo_type=contents.repo_type, revision=revision)
            if {file.path: stored_hash(file) for file in found} == {
                file.path: contents.sha256(file.path) if file.lfs else blob_hash(contents, file.path) for file in found
            } and len(found) == len(contents.files):
                commit = api.repo_info(repo_id, repo_type=contents.repo_type, revision=revision).sha
                return commit, request.url
        except (RevisionNotFoundError, EntryNotFoundError):
            continue  # closed meanwhile
    return None, None


def stored_hash(file: Any) -> str:
    return file.lfs.sha256 if file.lfs else file.blob_id


def blob_hash(contents: Contents, name: str) -> str:
    """What git calls the file."""
    content = contents.files[name]
    data = content if isinstance(content, bytes) else content.read_bytes()
    return sha1(b"blob %d\0" % len(data) + data).hexdigest()


def verification(
    contents: Contents, published: Publication, folder: Path, scratch: Path, token: str | None, endpoint: str | None
) -> list[str]:
    downloaded = compare_files(
        contents, published.repo_id, published.commit, scratch / "downloaded", token=token, endpoint=endpoint
    )
    notes = [f"verified: {len(contents.files)} files downloaded again, every SHA-256 the same"]
    if RESULTS in contents.files:
        notes.append(f"verified: {compare_results(downloaded)}")
    if contents.repo_type == "model":
        notes.append(f"verified: {compare_answers(folder, downloaded, scratch)}")
    return notes


# What went wrong --------------------------------------------------------------------------------------------


def explanation(error: Exception, endpoint: str) -> str:
    """One sentence about `error`, with what to do about it."""
    if isinstance(error, PublishError):
        return f"{error}."
    if isinstance(error, RuntimeError) and isinstance(error.__cause__, HfHubHTTPError):
        error = error.__cause__  # of the storage, which huggingface_hub wraps
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
        return f"the Hub refuses the card: {said}"
    return f"{endpoint} cannot be reached or broke off ({type(error).__name__}{': ' + said if said else ''})."


def publish_command(folder: str | os.PathLike, repo_id: str, **options: Any) -> str:
    """The shell command that publishes with the same options, which are `publish`'s. It holds no token."""
    words = [*command_words("publish"), str(folder), "--repo_id", repo_id]
    usual = inspect.signature(publish).parameters
    for name, value in options.items():
        if name == "verify":  # the only one that is on unless it is switched off
            words += [] if value else ["--no_verify"]
        elif value not in (None, False, usual[name].default):
            words.append(f"--{name}")
            if value is not True:
                words += list(value) if isinstance(value, (list, tuple)) else [str(value)]
    return shlex.join(words)
