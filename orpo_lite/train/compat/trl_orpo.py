"""`python -m orpo_lite.compat.trl_orpo`: TRL's orpo.py by its own flags."""

from orpo_lite.train.trl_command import start

if __name__ == "__main__":
    start()
