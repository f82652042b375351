"""`orpo-lite recipes`: the shipped recipes and what each needs."""

from __future__ import annotations

import json
from typing import Annotated

import typer
from rich.table import Table

from orpo_lite.cli import console, run_command
from orpo_lite.recipe import json_schema
from orpo_lite.recipe.source import read_yaml, shipped_recipes


def command(
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="print the recipes' JSON Schema, for editors")] = False,
) -> None:
    """List the shipped recipes and what each needs."""
    if schema:
        print(json_schema())
        return
    rows = []
    for name, path in shipped_recipes().items():
        content = read_yaml(path)
        rows.append({"recipe": name, "base": content["model"]["name_or_path"], "needs": content.get("needs", "")})
    if as_json:
        print(json.dumps(rows, indent=1))
        return
    table = Table("recipe", "base model", "needs", box=None)
    for row in rows:
        table.add_row(*row.values())
    console.print(table)


if __name__ == "__main__":
    run_command(command)
