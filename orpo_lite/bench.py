"""`python -m orpo_lite.bench`; the code is in orpo_lite/train/bench_command.py."""

from orpo_lite.common.console import run_command
from orpo_lite.train.bench_command import command

if __name__ == "__main__":
    run_command(command)
