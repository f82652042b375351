"""`python -m orpo_lite.data`."""

from orpo_lite.common.console import run_command
from orpo_lite.data.preview import command

if __name__ == "__main__":
    run_command(command)
