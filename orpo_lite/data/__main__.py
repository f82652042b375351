"""`python -m orpo_lite.data`."""

from orpo_lite.cli import run_command
from orpo_lite.data.show import command

run_command(command)
