from orpo_lite.cli import run_command
from orpo_lite.evaluate.entry import command

if __name__ == "__main__":
    run_command(command)
