"""`orpo_lite.train`, of which a rank is harmed once, at the beginning of a step: HARM=kill|raise|hang:RANK:STEP."""

import os
import signal
import time
from pathlib import Path

from transformers import TrainerCallback

from orpo_lite.common.console import run_command
from orpo_lite.train.__main__ import command
from orpo_lite.trainer.trainer import ORPOTrainer


class Harm(TrainerCallback):
    def on_step_begin(self, args, state, control, **kwargs):
        how, rank, step = os.environ["HARM"].split(":")
        mark = Path(os.environ["HARMED"])
        if args.process_index != int(rank) or state.global_step + 1 != int(step) or mark.exists():
            return
        mark.touch()
        if how == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if how == "hang":
            time.sleep(300)
        raise RuntimeError("harmed")


if os.environ.get("HARM"):
    made = ORPOTrainer.__init__

    def harmed(self, *args, **kwargs):
        made(self, *args, **kwargs)
        self.add_callback(Harm())

    ORPOTrainer.__init__ = harmed

if __name__ == "__main__":
    run_command(command)
