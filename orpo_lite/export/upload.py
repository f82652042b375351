"""One commit of a parcel to the hub: resumed where it broke, checked against the hub's listing, refusals in words."""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, HfApi, constants, get_token
from huggingface_hub import errors as hub_errors
from huggingface_hub.hf_api import RepoFile
from rich.filesize import decimal

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.export.publish import Entry, Parcel

# httpx's or httpx2's, whichever this version of the client stands on; HfHubHTTPError is one of them
HTTPError: type[Exception] = hub_errors.HTTPError  # pyright: ignore[reportPrivateImportUsage]
WAITS = (1, 4, 10)
"""Seconds between attempts at what huggingface_hub itself tries only once."""
ALONE = 1_000_000
"""Bytes from which a file is uploaded before the commit."""
T = TypeVar("T")


class Upload:
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
        self.digests: dict[tuple[str, str], str] = {}
        self.state = "not asked"
        self.visibility = "not asked"

    @property
    def url(self) -> str:
        return f"{self.api.endpoint}/{self.repo}" + (f"/tree/{self.revision}" if self.revision else "")

    def open(self, private: bool | None) -> None:
        """Make the repository and its branch where they are missing; an existing one is left as it is.

        Args:
            private: what was asked for; None means private where it is new.
        """
        with self.in_words():
            found = self.patiently(self.look)
            if found is None:
                wanted = private is not False
                self.patiently(lambda: self.api.create_repo(self.repo, private=wanted, exist_ok=True))
                self.visibility = "private" if wanted else "public"
                self.state = f"new, {self.visibility}"
            else:
                self.visibility = "private" if found.private else "public"
                self.state = f"exists, {self.visibility}"
                if private and not found.private:
                    raise RequestError(
                        f"--private: {self.repo} exists and is public, and a push never changes that: make it private on "
                        f"{self.url}/settings, or choose another --repo"
                    )
            if self.revision:
                branch = self.revision
                self.patiently(lambda: self.api.create_branch(self.repo, branch=branch, exist_ok=True))

    def look(self) -> Any:
        """The hub's facts of the repository; None where it has none of that name for this token."""
        try:
            return self.api.repo_info(self.repo)
        except hub_errors.RepositoryNotFoundError as error:
            # a hub that refuses the token also says 401, without this code
            if error.response.status_code == 401 and error.response.headers.get("X-Error-Code") != "RepoNotFound":
                raise
            return None

    def send(self, parcel: Parcel, message: str) -> str:
        """Upload what the hub lacks and commit it. Returns the commit's id: the newest where nothing had changed.

        Raises:
            RequestError: the hub refused, or could not be reached for long enough.
            RuntimeError: the hub's listing afterwards is not what was sent.
        """
        total = len(parcel.entries)
        with self.in_words("what was uploaded is kept: the same command goes on from there"):
            for attempt, wait in enumerate((*WAITS, None)):
                # asked again after a broken commit: it may have arrived though its answer did not
                changed = self.changed(parcel)
                if not changed:
                    break
                if not attempt:
                    size = decimal(sum(entry.size for entry in changed))
                    others = "" if len(changed) == total else "; the hub has the others"
                    console.print(f"uploading {len(changed)} of {total} files, {size}{others}")
                operations = [CommitOperationAdd(entry.name, entry.content) for entry in changed]
                for operation in operations:
                    # one by one, so that every finished file counts when the next one breaks
                    if operation.upload_info.size > ALONE:
                        self.api.preupload_lfs_files(self.repo, [operation], revision=self.revision, free_memory=False)
                try:
                    commit = self.api.create_commit(
                        self.repo, operations, commit_message=message, revision=self.revision
                    ).oid
                    self.verify(parcel)
                    return commit
                except HTTPError as error:
                    if wait is None or not passing(error):
                        raise
                    self.wait(wait, error)
            self.verify(parcel)
            commit = self.api.repo_info(self.repo, revision=self.revision).sha
        console.print("nothing to commit: the hub holds these files already")
        return str(commit)

    def listing(self) -> dict[str, RepoFile]:
        tree = self.api.list_repo_tree(self.repo, recursive=True, revision=self.revision)
        return {file.path: file for file in tree if isinstance(file, RepoFile)}

    def changed(self, parcel: Parcel) -> list[Entry]:
        """Files that the hub lacks or has otherwise.

        Raises:
            RequestError: the repository holds another kind of model, which loaders would mix with this one.
        """
        there = self.listing()
        other = {"adapter": "config.json", "merged": "adapter_config.json"}.get(parcel.kind)
        if other in there:
            raise RequestError(
                f"{self.repo} holds {'an adapter' if parcel.kind == 'merged' else 'a whole model'} ({other}): loaders "
                f"would mix it with this {parcel.kind} model: choose another --repo or --revision"
            )
        return [entry for entry in parcel.entries if self.difference(entry, there.get(entry.name))]

    def verify(self, parcel: Parcel) -> None:
        there = self.listing()
        wrong = {entry.name: self.difference(entry, there.get(entry.name)) for entry in parcel.entries}
        problems = [f"{name}: {what}" for name, what in wrong.items() if what]
        if problems:
            raise RuntimeError(
                f"after the upload {self.repo} is not what was sent (a .gitignore there? another push?):\n"
                + "\n".join(f"  - {line}" for line in problems)
            )

    def difference(self, entry: Entry, there: RepoFile | None) -> str | None:
        """What sets a file apart from the hub's of that name; None where they are the same bytes."""
        if there is None:
            return "missing"
        if there.size != entry.size:
            return f"has {there.size} bytes there, {entry.size} here"
        # a large file is known by its sha256, any other by git's name for it
        name, head, known = ("sha256", b"", there.lfs.sha256) if there.lfs else ("sha1", b"blob %d\0", there.blob_id)
        if (entry.name, name) not in self.digests:
            self.digests[entry.name, name] = digest(entry, name, head and head % entry.size)
        return None if self.digests[entry.name, name] == known else f"has other bytes there ({name})"

    def patiently(self, call: Callable[[], T]) -> T:
        """Try again what the hub could not do just now."""
        for wait in WAITS:
            try:
                return call()
            except hub_errors.HfHubHTTPError as error:
                if not passing(error):
                    raise
                self.wait(wait, error)
        return call()

    def wait(self, seconds: int, error: Exception) -> None:
        console.print(
            f"{self.api.endpoint}: {self.plain(reason(error))}; trying again in {seconds} s",
            soft_wrap=True,
            markup=False,
        )
        time.sleep(seconds)

    def plain(self, text: str) -> str:
        """The text on one line, without the token, should a server send it back."""
        return " ".join(text.replace(self.token, "***").split())

    @contextlib.contextmanager
    def in_words(self, comfort: str = "") -> Iterator[None]:
        """Turn what the hub's client raises into words. Causes are cut off, as their texts may quote the request."""
        try:
            yield
        except RequestError:
            raise
        except Exception as error:
            chain = causes(error)
            known = next((e for e in chain if isinstance(e, HTTPError | hub_errors.OfflineModeIsEnabled)), None)
            text = self.plain(self.explain(known) if known else f"{type(error).__name__}: {error}")
            kind = RequestError if known else RuntimeError
            # no cause: --debug would print it
            raise kind(text + (f"; {comfort}" if comfort else "")) from None

    def explain(self, error: BaseException) -> str:
        """A refusal: what the hub said, and what to do."""
        user, endpoint = self.repo.partition("/")[0], self.api.endpoint
        if isinstance(error, hub_errors.OfflineModeIsEnabled):
            return "the hub cannot be reached: HF_HUB_OFFLINE (or TRANSFORMERS_OFFLINE) is set: unset it to push"
        if not isinstance(error, hub_errors.HfHubHTTPError):
            return f"{endpoint} cannot be reached ({reason(error)}): is this machine online, and HF_ENDPOINT right?"
        status, said = error.response.status_code, reason(error)
        full = any(word in said.lower() for word in ("storage", "quota", "exceed", "payment"))
        if status == 401:
            return f"{endpoint} refused the token: make a new one on {endpoint}/settings/tokens, then `hf auth login` (HF_TOKEN, where set, comes first)"
        if status in (402, 413, 507) or (status == 403 and full):
            return f"{endpoint} has no room for this in {self.repo} ({said}): see {endpoint}/settings/billing for {user}'s storage"
        if status == 403:
            return (
                f"this token may not write to {self.repo} ({said}): expected your own name, or an organisation that you "
                "may write to, before the /, and a token of role `write`"
            )
        if status == 404:
            return f"{endpoint} finds no {self.repo} to write to ({said}): is {user} the right user or organisation?"
        if status in (409, 412):
            return f"{self.repo} was changed by someone else meanwhile ({said}): push again"
        if status == 429:
            after = error.response.headers.get("Retry-After")
            return (
                f"{endpoint} limits how often you may ask ({said}): push again {f'in {after} s' if after else 'later'}"
            )
        if status >= 500:
            return f"{endpoint} has trouble of its own ({said}), also after several attempts: push again later"
        return f"{endpoint} refused the request ({said})"


def passing(error: BaseException) -> bool:
    """True for what may go well in a moment: the hub's own trouble, or a connection that dropped."""
    return not isinstance(error, hub_errors.HfHubHTTPError) or error.response.status_code in (500, 502, 503, 504)


def reason(error: BaseException) -> str:
    """Status and the server's words, or the error's."""
    if isinstance(error, hub_errors.HfHubHTTPError):
        return f"{error.response.status_code} {error.server_message or error.response.reason_phrase}".strip()
    return f"{type(error).__name__}: {error}"


def causes(error: BaseException) -> list[BaseException]:
    chain: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in chain:
        chain.append(cause)
        cause = cause.__cause__ or cause.__context__
    return chain


def digest(entry: Entry, name: str, head: bytes = b"") -> str:
    found = hashlib.new(name, head)
    if isinstance(entry.content, bytes):
        found.update(entry.content)
    else:
        with entry.content.open("rb") as file:
            while block := file.read(1 << 24):
                found.update(block)
    return found.hexdigest()
