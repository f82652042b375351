"""`python -m orpo_lite.push RUN --repo USER/NAME`: adapter, merged model or GGUF file to the Hugging Face hub."""

from __future__ import annotations

import contextlib
import json
import re
import shutil
import struct
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.filesize import decimal

from orpo_lite.common.console import console, json_alone
from orpo_lite.common.errors import RequestError
from orpo_lite.export.publish import COMMON, Entry, Parcel, find_secrets, pack, read_json, refuse
from orpo_lite.export.publish_paths import LOCAL, base_names, recipe_of, take_out_paths
from orpo_lite.recipe.loading import BUILTIN

NOTES = re.compile(r"(?m)^## Notes\n\n(?:- .*\n)+")


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
    """Publish a run folder's adapter, its merged model, or a GGUF file made from it, in one commit.

    Only files of an allow-list go, and they are listed first. Weights are uploaded one by one before the commit, and
    what the hub has already is not sent again, so the same call goes on where a broken one stopped. The token is
    huggingface_hub's (`hf auth login`, HF_TOKEN); it is neither shown nor stored.

    Args:
        source: run folder, or a folder that orpo_lite.merge has written.
        repo: USER/NAME; made if the hub has none. An existing one keeps its visibility.
        merged: merge the adapter first, in a temporary folder beside the run.
        gguf: push this file, with the Modelfile beside it if that names it; `source` gives card and recipe.
        private: False for a public repository; None means private where the repository is new.
        revision: branch; made if the repository has none of that name. Default: main.
        message: commit message.
        base_repo: hub id to name as the base, where the run was trained on a local copy.
        dry_run: show the same and send nothing, not one request.
        facts: takes in what is said on screen: the files that go, those that stay and why, notes, commit.

    Returns:
        Id of the commit that holds the files (the newest, where nothing had changed); None after a dry run.

    Raises:
        RequestError: something in the folder is not to be published; no token, no rights, no room, no connection.
        RuntimeError: after the upload the hub lists a file otherwise than it was sent.
    """
    from huggingface_hub import get_token

    check_names(repo, base_repo)
    if merged and gguf is not None:
        raise RequestError("--merged and --gguf: push one, then the other, to repositories of their own")
    folder = Path(source)
    with contextlib.ExitStack() as stack:
        if dry_run:
            stack.enter_context(offline())
            hub = None
        else:
            from orpo_lite.export.upload import Upload

            hub = Upload(repo, revision)
        token = get_token()
        parcel = pack(folder, token)
        merging = merged and parcel.kind == "adapter"
        if gguf is not None:
            parcel = gguf_parcel(Path(gguf), parcel, token)
        elif merging:
            if hub:
                hub.open(private)  # a refusal should not come after minutes of merging
            parcel = merged_parcel(folder, stack.enter_context(scratch(folder)), parcel, token)
        write_card(parcel, folder, repo, base_repo)
        take_out_paths(parcel, folder, base_repo)
        made = [e for e in parcel.entries if isinstance(e.content, bytes)]
        refuse(folder, [f"{e.name}, {found}" for e in made for found in find_secrets(e.content, token)])
        if hub and not merging:
            hub.open(private)
        state = hub.state if hub else f"{'public' if private is False else 'private'} if new"
        show(parcel, f"{repo} ({state})" + (f", branch {revision}" if revision else ""))
        if facts is not None:
            facts |= {"repository": repo, "state": state, "revision": revision, "kind": parcel.kind, "commit": None,
                      "files": [{"name": e.name, "bytes": e.size, "what": e.what} for e in parcel.entries],
                      "stays": [{"name": name, "bytes": size, "why": why} for name, size, why in parcel.stays],
                      "notes": parcel.notes}  # fmt: skip
        if hub is None:
            console.print("dry run: nothing was sent")
            return None
        commit = hub.send(parcel, message or f"{parcel.kind} of {folder.resolve().name}, by orpo-lite")
        if facts is not None:
            facts |= {"commit": commit, "url": hub.url}
        console.print(f"{hub.url} ({hub.visibility}), commit {commit}\nload it:", soft_wrap=True, markup=False)
        console.print(usage(parcel, folder, repo, revision, base_repo), soft_wrap=True, markup=False)
    return commit


def check_names(repo: str, base_repo: str | None) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    for option, name in (("--repo", repo), ("--base-repo", base_repo)):
        try:
            if name is not None:
                validate_repo_id(name)
                if name.count("/") != 1:
                    raise RequestError(f"{option}: found {name!r}, expected USER/NAME, or ORGANISATION/NAME")
        except HFValidationError as error:
            raise RequestError(f"{option}: found {name!r}, expected USER/NAME ({error})") from None


@contextlib.contextmanager
def offline() -> Iterator[None]:
    """No request leaves, not even to look whether a cached base is the newest."""
    from huggingface_hub import constants

    before = constants.HF_HUB_OFFLINE
    constants.HF_HUB_OFFLINE = True
    try:
        yield
    finally:
        constants.HF_HUB_OFFLINE = before


@contextlib.contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """A temporary folder beside the run: the disk that held the run has room for a model sooner than /tmp has."""
    folder = folder.resolve()
    place = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}-merged-"))
    try:
        yield place
    finally:
        shutil.rmtree(place, ignore_errors=True)


def merged_parcel(run: Path, place: Path, of_run: Parcel, token: str | None) -> Parcel:
    """The run's adapter merged into its base, with the run's recipe and curves."""
    from orpo_lite.merge.run import merge

    console.print("merging into a temporary folder beside the run, removed after the push")
    parcel = pack(merge(run, place / run.resolve().name), token)
    take_along(of_run, parcel)
    return parcel


def gguf_parcel(file: Path, of_run: Parcel, token: str | None) -> Parcel:
    """A GGUF file, the Modelfile beside it, and the run's recipe and curves."""
    if not file.is_file():
        raise RequestError(f"--gguf: there is no file {file}; make one with python -m orpo_lite.export")
    with file.open("rb") as opened:
        head = opened.read(4096)
    if head[:4] != b"GGUF":
        raise RequestError(f"--gguf: {file} is not a GGUF file; make one with python -m orpo_lite.export")
    # a string field of the header: name, kind of value (8), length, text
    if struct.pack("<IQ", 8, 7).join((b"general.type", b"adapter")) in head:
        raise RequestError(
            f"--gguf: {file} is an adapter, whose card would be that of a whole model: push the run itself, or the GGUF "
            "file of the merged model (export without --adapter)"
        )
    parcel = Parcel("gguf", [Entry(file.name, file, "weights, tokenizer and template in one file")])
    modelfile = file.with_name("Modelfile")
    if modelfile.is_file():
        refuse(file.parent, [f"Modelfile, {found}" for found in find_secrets(modelfile, token)])
        text = modelfile.read_text("utf-8")
        # a reader has the two side by side, wherever the file was exported to
        here, count = re.subn(
            rf"(?m)^((?:FROM|ADAPTER)\s+)\S*?{re.escape(file.name)}\s*$", lambda m: f"{m[1]}./{file.name}", text
        )
        if count:
            parcel.put(Entry("Modelfile", here.encode("utf-8"), "for `ollama create`"))
        else:
            parcel.stays.append(("Modelfile", modelfile.stat().st_size, f"does not name {file.name}"))
    take_along(of_run, parcel)
    return parcel


def take_along(run: Parcel, parcel: Parcel) -> None:
    """Of the run's files, those that say what the parcel's weights are; what stayed there stays."""
    for entry in run.entries:
        if entry.name in ("recipe.yaml", "curves.png") or entry.what == COMMON["LICENSE"]:
            if parcel.entry(entry.name) is None:
                parcel.put(entry)
    parcel.stays = [(name, size, why) for name, size, why in run.stays if parcel.entry(name) is None] + parcel.stays


def write_card(parcel: Parcel, folder: Path, repo: str, base_repo: str | None) -> None:
    """The run's model card, with the repository's name in its commands; one that was edited by hand goes as it is."""
    if not ((folder / "recipe.yaml").is_file() and (folder / "run.json").is_file()):
        if parcel.entry("README.md") is None:
            parcel.notes.append("WARNING: no model card: the folder holds neither README.md nor a run's run.json")
        else:
            parcel.notes.append(f"README.md goes as it is: commands in it may name the folder, not {repo}")
        return
    from orpo_lite.report.model_card import model_card

    readme = folder / "README.md"
    if parcel.kind == "adapter" and readme.is_file() and readme.read_text("utf-8") != model_card(folder):
        parcel.notes.append("README.md is not the card that run.json gives (edited?), so it goes as it is")
        return
    text = model_card(folder, parcel.kind, repo=repo, base=base_repo)
    found = NOTES.search(parcel.bytes_of("README.md").decode("utf-8"))
    if found and parcel.kind == "merged":  # what merging found out stands in its own card only
        text = NOTES.sub(lambda _: found[0], text)
    parcel.put(Entry("README.md", text.encode("utf-8"), COMMON["README.md"]))


def show(parcel: Parcel, target: str) -> None:
    """Every file that goes, every one that stays and why, and the notes."""
    sizes = {entry.name: entry.size for entry in parcel.entries}
    width = max(map(len, [*sizes, *(name for name, _, _ in parcel.stays)]))
    lines = [f"to {target}:"]
    lines += [f"  {e.name:<{width}}  {decimal(sizes[e.name]):>9}  {e.what}" for e in parcel.entries]
    lines.append(f"  {len(sizes)} files, {decimal(sum(sizes.values()))}")
    if parcel.stays:
        lines.append("stays at home:")
        lines += [f"  {name:<{width}}  {decimal(size):>9}  {why}" for name, size, why in parcel.stays]
    console.print("\n".join([*lines, *parcel.notes]), soft_wrap=True, markup=False)


def usage(parcel: Parcel, folder: Path, repo: str, revision: str | None, base_repo: str | None) -> str:
    """How to load what was pushed; the card says more."""
    at = f", revision={revision!r}" if revision else ""
    if parcel.kind == "gguf":
        file = next(entry.name for entry in parcel.entries if entry.name.endswith(".gguf"))
        branch = f" --revision {revision}" if revision else ""
        return f"  hf download {repo} {file}{branch}" + ("" if revision else f"\n  ollama run hf.co/{repo}")
    if parcel.kind == "merged":
        kind = "Seq2SeqLM" if json.loads(parcel.bytes_of("config.json")).get("is_encoder_decoder") else "CausalLM"
        return f"  transformers.AutoModelFor{kind}.from_pretrained({repo!r}{at})"
    base, _ = base_names(folder, recipe_of(folder), base_repo)
    if base.startswith((LOCAL, BUILTIN)) or not base:
        return (
            f"  peft.PeftModel.from_pretrained(base, {repo!r}{at})  # base: {base.removeprefix(LOCAL)}, loaded before"
        )
    kind = "Seq2SeqLM" if read_json(folder / "adapter_config.json").get("task_type") == "SEQ_2_SEQ_LM" else "CausalLM"
    return f"  peft.AutoPeftModelFor{kind}.from_pretrained({repo!r}{at})"


def command(
    source: Annotated[str, typer.Argument(metavar="RUN", help="run folder, or a folder written by orpo_lite.merge")],
    repo: Annotated[str, typer.Option(help="USER/NAME on the hub; made if it is not there")],
    merged: Annotated[bool, typer.Option("--merged", help="push the merged model, not the adapter")] = False,
    gguf: Annotated[str | None, typer.Option(help="push this GGUF file of the run")] = None,
    private: Annotated[
        bool | None, typer.Option("--private/--public", help="of a new repository; default: private")
    ] = None,
    revision: Annotated[str | None, typer.Option(help="branch to push to; made if it is not there")] = None,
    message: Annotated[str | None, typer.Option(help="commit message")] = None,
    base_repo: Annotated[
        str | None, typer.Option(help="hub id of the base, where the run was trained on a copy of it")
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="show what would go, and send nothing")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Publish a run's adapter, its merged model or a GGUF file of it on the Hugging Face hub."""
    facts: dict[str, Any] = {}
    with json_alone(as_json) as tell:
        push(source, repo, merged=merged, gguf=gguf, private=private, revision=revision, message=message,
             base_repo=base_repo, dry_run=dry_run, facts=facts)  # fmt: skip
        if as_json:
            tell(facts)
