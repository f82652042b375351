"""`python -m orpo_lite.push`; the code is in orpo_lite/export/hub.py."""

from orpo_lite.common.console import run_command
from orpo_lite.export.hub import command

if __name__ == "__main__":
    run_command(command)
