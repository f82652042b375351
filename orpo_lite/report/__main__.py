"""`python -m orpo_lite.report`."""

from orpo_lite.common.console import run_command
from orpo_lite.report import command

if __name__ == "__main__":
    run_command(command)
