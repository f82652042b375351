"""`python -m orpo_lite.recipes`; the code is in orpo_lite/recipe/listing.py."""

from orpo_lite.common.console import run_command
from orpo_lite.recipe.listing import command

if __name__ == "__main__":
    run_command(command)
