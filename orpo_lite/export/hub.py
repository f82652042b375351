"""`python -m orpo_lite.push RUN --repo USER/NAME`: adapter, merged model or GGUF file to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from huggingface_hub import HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.utils import validate_repo_id
from rich.filesize import decimal

from orpo_lite.common.console import console, json_alone
from orpo_lite.common.credentials import find_secrets
from orpo_lite.common.errors import RequestError
from orpo_lite.common.published_files import ALLOWED, match, refuse
from orpo_lite.export.upload_plan import (
    LOCAL,
    Kind,
    UploadPlan,
    add_card,
    base_names,
    plan_gguf,
    plan_merged,
    plan_upload,
    read_json,
    remove_local_paths,
    temporary_folder_beside,
)
from orpo_lite.recipe.loading import BUILTIN


def push(
    source: str | Path,
    repo: str,
    *,
    merged: bool = False,
    gguf: str | Path | None = None,
    private: bool | None = None,
    revision: str | None = None,
    message: str | None = None,
    base_repo: str | None = None,
    dry_run: bool = False,
    facts: dict[str, Any] | None = None,
) -> str | None:
    """Publish a run folder's adapter, its merged model, or a GGUF file made from it.

    Only files of an allow-list are uploaded, and they are listed first. The hub keeps what an interrupted upload has
    sent, so the same call resumes it. The token is huggingface_hub's (`hf auth login`, HF_TOKEN); it is neither shown
    nor stored.

    Args:
        source: run folder, or a folder that orpo_lite.merge has written.
        repo: USER/NAME; created if the hub has none. An existing one keeps its visibility.
        merged: merge the adapter first, in a temporary folder beside the run.
        gguf: push this file, with the Modelfile beside it if that names it; `source` gives card and recipe.
        private: False for a public repository; None means private where the repository is new.
        revision: branch; created if the repository has none of that name. Default: main.
        message: commit message.
        base_repo: hub id to name as the base, where the run was trained on a local copy.
        dry_run: show the same and send nothing, not one request.
        facts: receives what is printed: the files that are uploaded, those that are kept and why, notes, commit.

    Returns:
        Id of the commit that holds the files (the newest, where nothing had changed); None after a dry run.

    Raises:
        RequestError: something in the folder must not be published; no token, no rights, no room, no connection.
    """
    check_names(repo, base_repo)
    if merged and gguf is not None:
        raise RequestError("--merged and --gguf: push one, then the other, to repositories of their own")
    folder = Path(source)
    with contextlib.ExitStack() as stack:
        hub = None if dry_run else Repository(repo, revision)
        if dry_run:
            stack.enter_context(offline())
        token, state = get_token(), f"{'public' if private is False else 'private'} if new"
        plan = plan_upload(folder, token)
        merging = merged and plan.kind == "adapter" and gguf is None
        if gguf is not None:
            plan = plan_gguf(Path(gguf), plan, token)
        if hub:  # before the merge, which may take minutes
            state = hub.prepare("merged" if merging else plan.kind, private)
        if merging:
            plan = plan_merged(folder, stack.enter_context(temporary_folder_beside(folder)), plan, token)
        add_card(plan, folder, repo, base_repo)
        remove_local_paths(plan, folder, base_repo)
        changed = {name: content for name, content in plan.files.items() if isinstance(content, bytes)}
        refuse(folder, [f"{name}, {found}" for name, text in changed.items() for found in find_secrets(text, token)])
        show(plan, f"{repo} ({state})" + (f", branch {revision}" if revision else ""))
        if facts is not None:
            what = ALLOWED[plan.kind]
            facts |= {"repository": repo, "state": state, "revision": revision, "kind": plan.kind, "commit": None,
                      "files": [{"name": n, "bytes": size, "what": match(n, what)} for n, size in plan.sizes().items()],
                      "stays": [{"name": n, "bytes": size_of(p), "why": why} for n, (p, why) in plan.kept.items()],
                      "notes": plan.notes}  # fmt: skip
        if hub is None:
            console.print("dry run: nothing was sent")
            return None
        commit = hub.upload(plan, message or f"{plan.kind} of {folder.resolve().name}, by orpo-lite")
        if facts is not None:
            facts |= {"commit": commit, "url": hub.url}
        console.print(f"{hub.url} ({state}), commit {commit}\nload it:", soft_wrap=True, markup=False)
        console.print(usage(plan, folder, repo, revision, base_repo), soft_wrap=True, markup=False)
    return commit


def check_names(repo: str, base_repo: str | None) -> None:
    """Raise RequestError unless the repositories are called USER/NAME."""
    for option, name in (("--repo", repo), ("--base-repo", base_repo)):
        try:
            if name is not None:
                validate_repo_id(name)
                if name.count("/") != 1:
                    raise RequestError(f"{option}: found {name!r}, expected USER/NAME, or ORGANIZATION/NAME")
        except hub_errors.HFValidationError as error:
            raise RequestError(f"{option}: found {name!r}, expected USER/NAME ({error})") from None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """Let no request leave, not even the one that asks for a newer version of a cached base."""
    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


def size_of(path: Path) -> int:
    """Return the bytes of a file, or of all files in a folder."""
    return sum(p.lstat().st_size for p in path.rglob("*")) if path.is_dir() else path.lstat().st_size


def show(plan: UploadPlan, target: str) -> None:
    """Print every file that is uploaded, every one that is kept and why, and the notes."""
    sizes, what = plan.sizes(), ALLOWED[plan.kind]
    width = max(map(len, [*sizes, *plan.kept]))
    lines = [f"to {target}:"]
    lines += [f"  {name:<{width}}  {decimal(size):>9}  {match(name, what)}" for name, size in sizes.items()]
    lines.append(f"  {len(sizes)} files, {decimal(sum(sizes.values()))}")
    if plan.kept:
        lines.append("not uploaded:")
        lines += [f"  {name:<{width}}  {decimal(size_of(p)):>9}  {why}" for name, (p, why) in plan.kept.items()]
    console.print("\n".join([*lines, *plan.notes]), soft_wrap=True, markup=False)


def usage(plan: UploadPlan, folder: Path, repo: str, revision: str | None, base_repo: str | None) -> str:
    """Return the line that loads what was pushed; the model card says more."""
    at = f", revision={revision!r}" if revision else ""
    if plan.kind == "gguf":
        file = next(name for name in plan.files if name.endswith(".gguf"))
        branch = f" --revision {revision}" if revision else ""
        return f"  hf download {repo} {file}{branch}" + ("" if revision else f"\n  ollama run hf.co/{repo}")
    if plan.kind == "merged":
        kind = "Seq2SeqLM" if json.loads(plan.read("config.json")).get("is_encoder_decoder") else "CausalLM"
        return f"  transformers.AutoModelFor{kind}.from_pretrained({repo!r}{at})"
    base, _ = base_names(folder, base_repo)
    if base.startswith((LOCAL, BUILTIN)) or not base:
        name = base.removeprefix(LOCAL)
        return f"  peft.PeftModel.from_pretrained(base, {repo!r}{at})  # base: {name}, loaded before"
    kind = "Seq2SeqLM" if read_json(folder / "adapter_config.json").get("task_type") == "SEQ_2_SEQ_LM" else "CausalLM"
    return f"  peft.AutoPeftModelFor{kind}.from_pretrained({repo!r}{at})"


class Repository:
    """A model repository on the hub as the target of one push.

    Raises:
        RequestError: there is no token on this machine.
    """

    def __init__(self, repo: str, revision: str | None = None):
        self.repo, self.revision = repo, revision
        self.token: str = get_token() or ""
        if not self.token:
            raise RequestError(
                f"no token for {constants.ENDPOINT}: run `hf auth login`, or set HF_TOKEN, with a token that may write "
                f"({constants.ENDPOINT}/settings/tokens)"
            )
        self.api = HfApi(token=self.token)

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}" + (f"/tree/{self.revision}" if self.revision else "")

    def prepare(self, kind: Kind, private: bool | None) -> str:
        """Create the repository and its branch where they are missing; an existing one is left as it is.

        Args:
            kind: what will be uploaded.
            private: what was asked for; None means private where the repository is new.

        Returns:
            "new" or "exists", and the visibility.

        Raises:
            RequestError: the repository is public although private was asked for, or holds another kind of model,
                which loaders would mix with this one.
        """
        with self.errors_in_words():
            try:
                public, age = not self.api.model_info(self.repo).private, "exists"
            except hub_errors.RepositoryNotFoundError:
                public, age = private is False, "new"
                self.api.create_repo(self.repo, private=not public, exist_ok=True)
            if private and public:
                raise RequestError(
                    f"--private: {self.repo} exists and is public, and a push never changes that: make it private on "
                    f"{self.url}/settings, or choose another --repo"
                )
            if self.revision:
                self.api.create_branch(self.repo, branch=self.revision, exist_ok=True)
            there = {file.rfilename for file in self.api.model_info(self.repo, revision=self.revision).siblings or ()}
        other = {"adapter": "config.json", "merged": "adapter_config.json"}.get(kind)
        if other in there:
            raise RequestError(
                f"{self.repo} holds {'an adapter' if kind == 'merged' else 'a whole model'} ({other}): loaders "
                f"would mix it with this {kind} model: choose another --repo or --revision"
            )
        return f"{age}, {'public' if public else 'private'}"

    def upload(self, plan: UploadPlan, message: str) -> str:
        """Upload exactly the files of the plan and commit them; return the commit's id."""
        with (
            self.errors_in_words("; the hub keeps what was uploaded: run the same command to resume"),
            tempfile.TemporaryDirectory(prefix="orpo-lite-push-") as folder,
        ):
            for name, content in plan.files.items():
                stage(Path(folder) / name, content)
            return self.api.upload_folder(
                repo_id=self.repo, folder_path=folder, commit_message=message, revision=self.revision
            ).oid

    @contextlib.contextmanager
    def errors_in_words(self, hint: str = "") -> Iterator[None]:
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
            text = self.explain(cause) if cause else f"{type(error).__name__}: {error}"
            text = " ".join(text.replace(self.token, "***").split())
            # without the cause, which --debug would print and which may quote the request
            raise (RequestError if cause else RuntimeError)(text + hint) from None

    def explain(self, error: BaseException) -> str:
        """Say what the hub answered, and what to do."""
        user, endpoint = self.repo.partition("/")[0], self.api.endpoint
        if isinstance(error, hub_errors.OfflineModeIsEnabled):
            return "the hub cannot be reached: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to push"
        if not isinstance(error, hub_errors.HfHubHTTPError):
            return (
                f"{endpoint} cannot be reached ({type(error).__name__}: {error}): is this machine online, and is "
                "HF_ENDPOINT right?"
            )
        status = error.response.status_code
        said = f"{status} {error.server_message or error.response.reason_phrase}".strip()
        full = any(word in said.lower() for word in ("storage", "quota", "exceed", "payment"))
        if status in (402, 413, 507) or (status == 403 and full):
            return f"{endpoint} has no room for this in {self.repo} ({said}): see {endpoint}/settings/billing for {user}'s storage"
        after = error.response.headers.get("Retry-After")
        return {
            401: f"{endpoint} refused the token: create a new one on {endpoint}/settings/tokens, then `hf auth login` "
            "(HF_TOKEN, where set, comes first)",
            403: f"this token may not write to {self.repo} ({said}): expected your own name, or an organization that "
            "you may write to, before the /, and a token with the role `write`",
            404: f"{endpoint} finds no {self.repo} to write to ({said}): is {user} the right user or organization?",
            409: f"{self.repo} was changed by someone else meanwhile ({said}): push again",
            412: f"{self.repo} was changed by someone else meanwhile ({said}): push again",
            429: f"{endpoint} limits how often you may ask ({said}): push again {f'in {after} s' if after else 'later'}",
        }.get(status) or (
            f"{endpoint} has trouble of its own ({said}): push again later"
            if status >= 500
            else f"{endpoint} refused the request ({said})"
        )


def stage(target: Path, content: Path | bytes) -> None:
    """Put a file where it is uploaded from: a link to it, or its changed content."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, bytes):
        target.write_bytes(content)
        return
    try:
        target.symlink_to(content.resolve())
    except OSError:  # Windows, where links need a right of their own
        shutil.copyfile(content, target)


def command(
    source: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a folder written by orpo_lite.merge")],
    repo: Annotated[str, typer.Option(help="USER/NAME on the hub; created if it is not there")],
    merged: Annotated[bool, typer.Option("--merged", help="push the merged model, not the adapter")] = False,
    gguf: Annotated[str | None, typer.Option(help="push this GGUF file of the run")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="visibility of a new repository; default: private")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch to push to; created if it is not there")] = None,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
    base_repo: Annotated[
        str | None, typer.Option(help="hub id of the base, where the run was trained on a copy of it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would be uploaded, and send nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Publish a run's adapter, its merged model or a GGUF file of it on the Hugging Face hub."""
    facts: dict[str, Any] = {}
    with json_alone(as_json) as print_json:
        push(source, repo, merged=merged, gguf=gguf, private=private, revision=revision, message=message,
             base_repo=base_repo, dry_run=dry_run, facts=facts)  # fmt: skip
        if as_json:
            print_json(facts)
