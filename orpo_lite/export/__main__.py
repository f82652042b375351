"""`python -m orpo_lite.export`."""

from orpo_lite.common.console import run_command
from orpo_lite.export.gguf import command

if __name__ == "__main__":
    run_command(command)
