"""`python -m orpo_lite.merge`."""

from orpo_lite.common.console import run_command
from orpo_lite.merge.run import command

if __name__ == "__main__":
    run_command(command)
