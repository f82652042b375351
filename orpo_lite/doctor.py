"""`python -m orpo_lite.doctor`; the code is in orpo_lite/train/doctor.py."""

from orpo_lite.common.console import run_command
from orpo_lite.train.doctor import command

if __name__ == "__main__":
    run_command(command)
