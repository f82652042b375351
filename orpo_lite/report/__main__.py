"""`python -m orpo_lite.report`."""

from orpo_lite.cli import run_command
from orpo_lite.report import command

run_command(command)
