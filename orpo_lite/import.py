"""`python -m orpo_lite.import`; the code is in orpo_lite/recipe/importers."""

from orpo_lite.common.console import run_command
from orpo_lite.recipe.importers import command

if __name__ == "__main__":
    run_command(command)
