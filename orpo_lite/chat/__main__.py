from orpo_lite.chat import command
from orpo_lite.cli import run_command

if __name__ == "__main__":
    run_command(command)
