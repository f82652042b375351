"""`python -m orpo_lite.import FILE`; the file is named as the command is."""

from orpo_lite.cli import run_command
from orpo_lite.compat.convert import command

__all__ = ["command"]

if __name__ == "__main__":
    run_command(command)
