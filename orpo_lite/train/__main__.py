"""`python -m orpo_lite.train --recipe NAME [key=value ...]`: one recipe, one run folder.

Recipe, arguments and local files are checked before torch is imported, so that a mistake is reported within a second.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from orpo_lite.common.console import errors, load, rank, refuse_sharding, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked, lock_folder
from orpo_lite.common.text import next_command
from orpo_lite.data.sources import is_local, local_files, open_source
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION
from orpo_lite.recipe.loading import ADAPTER_FOLDER, check_folder, check_model_path, resolve_path
from orpo_lite.recipe.validation import fields_by_name

if TYPE_CHECKING:
    from orpo_lite.trainer.run_folder import Resume


def command(
    recipe: Annotated[str | None, RECIPE_OPTION] = None,
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example training.learning_rate=5e-6")] = None,
    dry_run: Annotated[bool,
        typer.Option("--dry-run", help="do everything up to the first optimizer step; write nothing")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="resume from the newest good checkpoint, as the same "
        "command does by itself, and never start over; --resume=force resumes in spite of changes")] = False,
    resume_force: Annotated[bool, typer.Option("--resume-force", hidden=True)] = False,
    plan: Annotated[bool, typer.Option("--plan", help="predict the memory on the CPU as well, as is done on a GPU")] = False,
    force: Annotated[bool, typer.Option("--force", help="start even what cannot fit the GPU in this machine")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="print every derived number before training")] = False,
    base_figures: Annotated[Path | None, typer.Option(metavar="FOLDER", help="take what is measured before training from this "
        "folder, where a run of the same base, pairs and settings has put it; else measure, and put it there")] = None,
) -> None:  # fmt: skip
    """Train an adapter with ORPO as a recipe says."""
    if recipe is None:
        raise RequestError(
            "found no --recipe: name a shipped recipe (`orpo-lite recipes` lists them), a YAML file or a run folder"
        )
    resume_mode: Resume = "force" if resume_force else resume
    if dry_run and resume_mode:
        raise RequestError("--dry-run takes the first step of a new run: leave --resume out")
    refuse_sharding()
    chosen = Recipe.load(recipe, overrides or [])
    check_local_files(chosen)
    if not dry_run and rank() == 0 and is_locked(chosen.folder):
        lock_folder(chosen.folder)  # raises, and names the folder
    again = next_command("train", "--recipe", recipe, *(overrides or []))
    options = {"dry_run": dry_run, "plan": plan, "force": force, "again": again, "verbose": verbose}
    train(chosen, resume_mode, **options, base_figures=base_figures)


def check_local_files(recipe: Recipe) -> None:
    """Raise RequestError for a local data file, model or adapter folder that does not exist; the hub is not asked."""
    check_model_path(recipe.model.name_or_path)
    if recipe.adapter and recipe.adapter.init_from:
        check_folder(resolve_path(recipe.adapter.init_from), ADAPTER_FOLDER, field="adapter.init_from")
    for source in [*recipe.data.train, *(recipe.data.eval or [])]:
        path = os.path.expanduser(resolve_path(source.path))
        if is_local(source.path) and not os.path.isdir(path) and not local_files(path):
            open_source(source, recipe.data.split, None)  # raises, and says what was expected


def train(recipe: Recipe, resume: Resume, **options: Any) -> None:
    """Import what training needs, and train; a signal ends the command as a shell expects."""
    load("orpo_lite.train.pipeline")
    from orpo_lite.train.pipeline import run, silence_other_ranks
    from orpo_lite.trainer.distributed import as_lost_peer
    from orpo_lite.trainer.interruptions import Stopped

    if rank():
        silence_other_ranks()
    try:
        run(recipe, resume=resume, **options)
    except Stopped as stop:
        raise typer.Exit(128 + stop.number) from None
    except RuntimeError as error:
        if gone := as_lost_peer(error):
            raise gone from error
        raise


def on_usage_error(arguments: list[str]) -> None:
    """Show how a field is written that was given as a flag, as other tools take it."""
    for word in arguments:
        name, _, value = word.removeprefix("--").replace("-", "_").partition("=")
        if word.startswith("--") and (field := fields_by_name(Recipe).get(name)):
            word = field if "=" in field else f"{field}={value or 'VALUE'}"
            errors.print(f"a recipe's field is a word without dashes: {escape(word)}", soft_wrap=True)


if __name__ == "__main__":
    run_command(command, on_usage_error)
