"""`python -m orpo_lite.push RUN --repo USER/NAME`: adapter, merged model or GGUF file to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated
from unittest.mock import patch

import typer
from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import console, progress
from orpo_lite.common.credentials import match, refuse_secrets, without_secrets
from orpo_lite.common.errors import RequestError
from orpo_lite.recipe.loading import FINISHED_FOLDER, check_folder

if TYPE_CHECKING:
    from orpo_lite.export.upload_plan import UploadPlan
    from orpo_lite.report.model_card import Kind

REMEDIES: dict[int, str] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
"""Status of the hub's answer -> what it means, and what to do."""


def push(
    source: str | Path,
    repo: str,
    *,
    merged: bool = False,
    gguf: str | Path | None = None,
    private: bool | None = None,
    base_repo: str | None = None,
    dry_run: bool = False,
) -> str | None:
    """Publish a run folder's adapter, its merged model, or a GGUF file made from it.

    Only files of an allow-list are uploaded; they are listed first, and whatever else the folder holds with the reason why
    it stays. The hub keeps what an interrupted upload has sent, so the same call resumes it. The token is huggingface_hub's
    (`hf auth login`, HF_TOKEN); it is neither shown nor stored.

    Args:
        source: run folder, or a folder that orpo_lite.merge has written.
        repo: USER/NAME; created if the hub has none. An existing one keeps its visibility.
        merged: merge the adapter first, in a temporary folder beside the run.
        gguf: push this file, with the Modelfile beside it if that names it; `source` gives card and recipe.
        private: False for a public repository; None means private where the repository is new.
        base_repo: hub id to name as the base, where the run was trained on a local copy.
        dry_run: show the same and send nothing, not one request.

    Returns:
        Id of the commit that holds the files (the newest, where nothing had changed); None after a dry run.

    Raises:
        RequestError: a text that would be uploaded holds a credential; no token, no rights, no room, no connection.
    """
    check_folder(source, FINISHED_FOLDER, on_hub=False)
    from orpo_lite.export.upload_plan import add_card, add_files_of_run, plan_gguf, plan_upload, remove_local_paths

    check_name("--repo", repo)
    if base_repo is not None:
        check_name("--base-repo", base_repo)
    if merged and gguf is not None:
        raise RequestError("--merged and --gguf: push one, then the other, to repositories of their own")
    folder, token = Path(source), get_token()
    if token is None and not dry_run:
        raise RequestError(
            f"no token for {constants.ENDPOINT}: run `hf auth login`, or set HF_TOKEN, with a token that may write "
            f"({constants.ENDPOINT}/settings/tokens)"
        )
    api = HfApi(token=token)
    with contextlib.ExitStack() as stack:
        if dry_run:
            # no request leaves, not even the one that asks for a newer version of a cached base
            stack.enter_context(patch.object(constants, "HF_HUB_OFFLINE", True))
        of_run = plan_upload(folder)
        plan = plan_gguf(Path(gguf)) if gguf is not None else of_run
        searched = of_run.files | plan.files
        refuse_secrets(folder, searched, token)
        merging = merged and plan.kind == "adapter"
        state = f"{'public' if private is False else 'private'} if new"
        if not dry_run:  # before the merge, which may take minutes
            state = prepare(api, repo, "merged" if merging else plan.kind, private)
        if merging:
            plan = plan_upload(merge_beside(folder, stack))
        if plan is not of_run:
            add_files_of_run(of_run, plan)
        add_card(plan, folder, repo, base_repo)
        remove_local_paths(plan, folder, base_repo)
        added = {name: content for name, content in plan.files.items() if content is not searched.get(name)}
        refuse_secrets(folder, added, token)
        show(plan, f"{repo} ({state})")
        if dry_run:
            console.print("dry run: nothing was sent")
            return None
        with (
            errors_in_words(repo, api, "; the hub keeps what was uploaded: run the same command to resume"),
            progress("uploading"),
        ):
            additions = [CommitOperationAdd(name, content) for name, content in plan.files.items()]
            message = f"{plan.kind} of {folder.resolve().name}, by orpo-lite"
            commit = api.create_commit(repo, additions, commit_message=message).oid
        console.print(f"{api.endpoint}/{repo} ({state}), commit {commit}", soft_wrap=True, markup=False)
    return commit


def check_name(option: str, name: str) -> None:
    """Raise RequestError unless a repository is called USER/NAME."""
    try:
        validate_repo_id(name)
        reason = "" if "/" in name else "no user"
    except hub_errors.HFValidationError as error:
        reason = str(error)
    if reason:
        raise RequestError(f"{option}: found {name!r}, expected USER/NAME, or ORGANIZATION/NAME ({reason})")


def merge_beside(folder: Path, stack: contextlib.ExitStack) -> Path:
    """Merge a run into a temporary folder beside it, whose disk is likelier to have room than that of /tmp."""
    from orpo_lite.merge.run import merge

    console.print("merging into a temporary folder beside the run, removed after the push")
    folder = folder.resolve()
    place = stack.enter_context(tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-merged-"))
    return merge(folder, Path(place) / folder.name)


def show(plan: UploadPlan, target: str) -> None:
    """Print every file that is uploaded, what is kept by the reason for it, and the notes."""
    rows = [(name, size_of(content), match(name, plan.allowed)) for name, content in sorted(plan.files.items())]
    total = f"  {len(rows)} files, {decimal(sum(size for _, size, _ in rows))}"
    for why in dict.fromkeys(why for _, why in plan.kept.values()):
        group = {name: path for name, (path, reason) in plan.kept.items() if reason == why}
        rows.append((", ".join(group), sum(map(size_of, group.values())), why))
    width = max(len(name) for name in plan.files)
    lines = [f"  {name:<{width}}  {decimal(size):>9}  {words}" for name, size, words in rows]
    lines.insert(len(plan.files), f"{total}\nnot uploaded:" if plan.kept else total)
    console.print("\n".join([f"to {target}:", *lines, *plan.notes]), soft_wrap=True, markup=False)


def size_of(content: Path | bytes) -> int:
    """Return the bytes of a content, of a file, or of all files in a folder."""
    if isinstance(content, bytes):
        return len(content)
    return content.stat().st_size if content.is_file() else sum(p.lstat().st_size for p in content.rglob("*"))


def prepare(api: HfApi, repo: str, kind: Kind, private: bool | None) -> str:
    """Create the repository where it is missing; an existing one is left as it is.

    Returns:
        "new" or "exists", and the visibility.

    Raises:
        RequestError: the repository is public although private was asked for, or holds another kind of model, which
            loaders would mix with this one.
    """
    with errors_in_words(repo, api):
        try:
            public, age = not api.model_info(repo).private, "exists"
        except hub_errors.RepositoryNotFoundError:
            public, age = private is False, "new"
            api.create_repo(repo, private=not public, exist_ok=True)
        if private and public:
            raise RequestError(
                f"--private: {repo} exists and is public, and a push never changes that: make it private on "
                f"{api.endpoint}/{repo}/settings, or choose another --repo"
            )
        there = {file.rfilename for file in api.model_info(repo).siblings or ()}
    other = {"adapter": "config.json", "merged": "adapter_config.json"}.get(kind)
    if other in there:
        raise RequestError(
            f"{repo} holds {'an adapter' if kind == 'merged' else 'a whole model'} ({other}): loaders would mix it with "
            f"this {kind} model: choose another --repo"
        )
    return f"{age}, {'public' if public else 'private'}"


@contextlib.contextmanager
def errors_in_words(repo: str, api: HfApi, hint: str = "") -> Iterator[None]:
    """Turn errors of the hub's client into RequestError without the token, should a server send it back."""
    try:
        yield
    except RequestError:
        raise
    except Exception as error:
        # httpx's or httpx2's, whichever this version of the client uses
        known = (hub_errors.HTTPError, hub_errors.OfflineModeIsEnabled)  # pyright: ignore[reportPrivateImportUsage]
        cause: BaseException | None = error
        while cause is not None and not isinstance(cause, known):
            cause = cause.__cause__ or cause.__context__
        text = explain(repo, api.endpoint, cause) if cause else f"{type(error).__name__}: {error}"
        text = " ".join(without_secrets(text).split())
        # without the cause, which --debug would print and which may quote the request
        raise (RequestError if cause else RuntimeError)(text + hint) from None


def explain(repo: str, endpoint: str, error: BaseException) -> str:
    """Say what the hub answered, and what to do."""
    if isinstance(error, hub_errors.OfflineModeIsEnabled):
        return "the hub cannot be reached: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to push"
    if not isinstance(error, hub_errors.HfHubHTTPError):
        return f"{endpoint} cannot be reached ({type(error).__name__}: {error}): is this machine online, and is HF_ENDPOINT right?"
    status = error.response.status_code
    said = f"{status} {error.server_message or error.response.reason_phrase}".strip()
    remedy = REMEDIES.get(status, "it refused the request for that reason; where it is busy, push again later").format(
        endpoint=endpoint, repo=repo, user=repo.partition("/")[0]
    )
    return f"{endpoint} answered {said} to the push to {repo}: {remedy}"


def command(
    source: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a folder written by orpo_lite.merge")],
    repo: Annotated[str, typer.Option(help="USER/NAME on the hub; created if it is not there")],
    merged: Annotated[bool, typer.Option("--merged", help="push the merged model, not the adapter")] = False,
    gguf: Annotated[str | None, typer.Option(help="push this GGUF file of the run")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="visibility of a new repository; default: private")
    ] = None,
    base_repo: Annotated[
        str | None, typer.Option(help="hub id of the base, where the run was trained on a copy of it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be uploaded, and send nothing")] = False,
) -> None:
    """Publish a run's adapter, its merged model or a GGUF file of it on the Hugging Face hub."""
    push(source, repo, merged=merged, gguf=gguf, private=private, base_repo=base_repo, dry_run=dry_run)
