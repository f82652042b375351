"""`orpo-lite recipes`: the shipped recipes and what each needs; the option that takes one of them."""

import json
from typing import Annotated

import typer
from rich.table import Table
from rich.text import Text

from orpo_lite.common.console import console
from orpo_lite.recipe.loading import read_yaml, shipped_recipes
from orpo_lite.recipe.schema import as_sources

RECIPE_OPTION = typer.Option(
    help="name of a shipped recipe, path of a YAML file, or run folder",
    autocompletion=lambda incomplete: [name for name in shipped_recipes() if name.startswith(incomplete)],
)
"""`--recipe`, as every command that reads one has it."""


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """List the shipped recipes and what each needs."""
    rows = []
    for name, path in shipped_recipes().items():
        content = read_yaml(path)
        sources = [source["path"] for source in as_sources(content["data"]["train"])]
        rows.append(
            {"recipe": name, "base": content["model"]["name_or_path"], "data": sources, "needs": content.get("needs", ""),
             "description": content.get("description", "")}
        )  # fmt: skip
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("recipe", "needs, base and data", box=None, padding=(0, 1))
    for row in rows:
        below = "\n".join([row["base"], *row["data"]])
        table.add_row(row["recipe"], Text.assemble(f"{row['needs']}\n", (below, "dim")))
    console.print(table)
    console.print("\nnext: python -m orpo_lite.train --recipe NAME data.train=my.jsonl --dry-run", soft_wrap=True)
