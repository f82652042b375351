"""`orpo-lite import FILE`: axolotl's and LLaMA-Factory's ORPO configurations as recipes, with an account of every field."""

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.padding import Padding
from rich.text import Text

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import visible
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.importers import axolotl, llamafactory
from orpo_lite.recipe.importers.draft import RecipeDraft
from orpo_lite.recipe.loading import read_yaml


def trainer_of(content: dict[str, Any], file: Path) -> tuple[str, Callable[[RecipeDraft], None]]:
    """Return the name of the trainer whose file it is, and the function that converts it.

    Raises:
        RequestError: neither axolotl's nor LLaMA-Factory's, or of a method other than ORPO.
    """
    if "base_model" in content:
        if content.get("rl") == "orpo":
            return "axolotl", axolotl.convert
        found = f"rl is {content.get('rl')!r}"
    elif "stage" in content or "finetuning_type" in content or "pref_loss" in content:
        stage, loss = content.get("stage"), content.get("pref_loss", "sigmoid")
        if stage == "orpo" or (stage, loss) == ("dpo", "orpo"):  # the former until 0.7
            return "LLaMA-Factory", llamafactory.convert
        found = f"stage is {stage!r} and pref_loss {loss!r}"
    elif {"model", "data"} <= content.keys():
        found = "this is a recipe already"
    else:
        found = f"found {', '.join(map(str, list(content)[:8]))}"
    raise RequestError(
        f"{file}: {found}, expected an ORPO configuration of axolotl (base_model, rl: orpo) or LLaMA-Factory (stage: dpo, "
        f"pref_loss: orpo); one of TRL's runs as it is: python -m orpo_lite.compat.trl_orpo --config {file}"
    )


def convert(file: Path, name: str) -> tuple[Recipe, RecipeDraft, str]:
    """Convert another trainer's file into a recipe called `name`.

    Returns:
        The recipe, the draft with the account of every field, and the trainer's name.

    Raises:
        RequestError: no such file, or values that no recipe takes.
    """
    content = read_yaml(file)
    whose, fill = trainer_of(content, file)
    draft = RecipeDraft(content, file.resolve().parent, str(file))
    draft.put("name", name)
    draft.put("description", f"Converted from {whose}'s {file.name}.")
    fill(draft)
    return Recipe.parse(draft.recipe, f"{file}, as a recipe"), draft, whose


def account(draft: RecipeDraft) -> Iterator[tuple[str, str]]:
    """Yield what has no equivalent, then what has another meaning: a title or a field with its value, and why."""
    for title, notes in (("no equivalent", draft.left), ("carried over with another meaning", draft.differs)):
        if notes:
            yield f"{title}:", ""
        yield from ((visible(f"  {note.field}: {note.value}"), visible(note.why)) for note in notes)


def command(
    file: Annotated[Path, typer.Argument(help="axolotl's or LLaMA-Factory's YAML")],
    output: Annotated[
        Path | None, typer.Option(help="the recipe to write; default: FILE's name with -recipe.yaml, here")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="write over an existing recipe")] = False,
) -> None:
    """Turn axolotl's `rl: orpo` or LLaMA-Factory's `pref_loss: orpo` YAML into a recipe, and account for every field."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", file.stem).strip("-.") or "imported"
    place = output or Path(f"{stem}-recipe.yaml")
    if place.exists() and not overwrite:
        raise RequestError(f"{place} exists already: name another with --output, or add --overwrite")
    recipe, draft, whose = convert(file, re.sub(r"[^A-Za-z0-9._-]+", "-", place.stem).strip("-.") or stem)
    head = f"# From {whose}'s {file.name}. Look first:\n#   python -m orpo_lite.train --recipe {place} --dry-run\n"
    written = recipe.model_dump(mode="json", exclude_unset=True)
    head += "".join(f"# {' : '.join(filter(None, part))}\n" for part in account(draft))
    write_atomically(place, head + yaml.safe_dump(written, sort_keys=False, allow_unicode=True))
    for line, why in account(draft):
        console.print(line, markup=False, soft_wrap=True)
        if why:
            console.print(Padding(Text(why), (0, 0, 0, 4)))
    console.print(
        f"{whose}: {len(draft.carried)} fields carried over; written: {place}\n"
        f"next: python -m orpo_lite.train --recipe {place} --dry-run",
        markup=False, soft_wrap=True,
    )  # fmt: skip
