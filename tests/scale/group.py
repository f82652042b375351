"""Functions run by a group of gloo processes, started from a server that has imported everything already; and torchrun."""

import faulthandler
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from pathlib import Path

import torch

ROOT = Path(__file__).parents[2]
WORDS = ["--recipe", "quickstart", "training.max_steps=8", "training.save_strategy=steps", "training.save_steps=2",
         "training.logging_steps=1", "training.eval_strategy=no", "evaluation.samples=2", "data.max_eval_rows=8",
         "training.warmup_steps=0", "training.save_total_limit=9", "training.per_device_train_batch_size=2"]  # fmt: skip
ALONE = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
"""Environment of a process started by a command."""
CONTEXT = multiprocessing.get_context("forkserver")
CONTEXT.set_forkserver_preload(["orpo_lite.trainer.trainer", "tests.scale.checks", "bitsandbytes"])


def together(function, processes, folder, *arguments, timeout=600, joined=None, **environment):
    """What each of `processes` processes returns from `function(*arguments)`, by rank.

    Args:
        joined: whether they are told of each other; default: where there are several.
    """
    joined = processes > 1 if joined is None else joined
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    folder.mkdir(parents=True, exist_ok=True)
    world = {"WORLD_SIZE": processes, "LOCAL_WORLD_SIZE": processes, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
             "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": 1, "HF_HUB_OFFLINE": 1, "GLOO_SOCKET_IFNAME": "lo"}  # fmt: skip
    if not joined:
        world = {name: value for name, value in world.items() if "WORLD" not in name and "MASTER" not in name}
    group = []
    for rank in range(processes):
        mine = world | ({"RANK": rank, "LOCAL_RANK": rank} if joined else {}) | environment
        process = CONTEXT.Process(target=member, args=(function, rank, mine, str(folder), arguments), daemon=True)
        process.start()
        group.append(process)
    end = time.monotonic() + timeout
    try:
        while any(one.is_alive() for one in group) and time.monotonic() < end:
            if failed := [one.exitcode for one in group if one.exitcode]:
                time.sleep(1)
                break
            time.sleep(0.05)
        else:
            failed = [one.exitcode for one in group if one.exitcode != 0]
    finally:
        for one in group:
            one.kill()
            one.join()
    errors = "\n".join(path.read_text() for path in sorted(folder.glob("error-*")))
    assert not failed, f"exit codes {[one.exitcode for one in group]}\n{errors[-6000:]}"
    return [torch.load(folder / f"result-{rank}.pt", weights_only=False) for rank in range(processes)]


def member(function, rank, environment, folder, arguments):
    os.environ.update({name: str(value) for name, value in environment.items()})
    torch.set_num_threads(1)
    stuck = open(f"{folder}/error-{rank}.stack.txt", "w")  # noqa: SIM115  # for as long as the process lives
    faulthandler.dump_traceback_later(float(os.environ.get("STUCK", 500)), file=stuck)
    try:
        torch.save(function(*arguments), f"{folder}/result-{rank}.pt")
    except BaseException:
        with open(f"{folder}/error-{rank}.txt", "w") as file:
            file.write(f"rank {rank}\n{traceback.format_exc()}")
        os._exit(1)
    if torch.distributed.is_initialized():
        torch.distributed.barrier()
    os._exit(0)


def torchrun(out, *options, words=(), **environment):
    """A real torchrun of two processes that train the quickstart, or harm it; its exit status and what it said."""
    module = "tests.scale.harmed" if "HARM" in environment else "orpo_lite.train"
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--rdzv_backend=c10d",
               "--rdzv_endpoint=localhost:0", *options, "-m", module, *WORDS, f"training.output_dir={out}", *words]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, env=ALONE | environment, cwd=ROOT, timeout=500)
    return done.returncode, done.stdout + done.stderr
