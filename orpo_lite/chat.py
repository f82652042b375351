"""`python -m orpo_lite.chat`; the code is in orpo_lite/evaluate/chat.py."""

from orpo_lite.common.console import run_command
from orpo_lite.evaluate.chat import command

if __name__ == "__main__":
    run_command(command)
