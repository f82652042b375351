"""`python -m orpo_lite.export`."""

from orpo_lite.cli import run_command
from orpo_lite.export import command

run_command(command)
