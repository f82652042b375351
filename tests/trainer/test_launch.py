"""Launcher configs: accelerate takes every key of every file, and a real launch of two processes trains."""

import argparse
import json
import os
import re
import socket
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import _validate_launch_command, launch_command_parser
from accelerate.utils.launch import _filter_args, prepare_multi_gpu_env
from torch.distributed.run import config_from_args, get_args_parser

from orpo_lite.recipe.loading import recipes_folder, shipped_recipes

ROOT = Path(__file__).parents[2]
FILES = {path.stem: path for path in sorted((recipes_folder() / "accelerate").glob("*.yaml"))}


def launcher(name: str, *words: str) -> argparse.Namespace:
    """accelerate's own arguments for a file, as `accelerate launch` has them when it starts torchrun."""
    line = ["--config_file", str(FILES[name]), *words, "-m", "orpo_lite.train", "--recipe", "quickstart"]
    args, _, _ = _validate_launch_command(launch_command_parser().parse_args(line))
    return args


def test_there_is_a_file_for_one_machine_and_for_several():
    assert set(FILES) == {"ddp", "ddp-multinode"}
    assert not set(FILES) & set(shipped_recipes())  # they are no recipes


@pytest.mark.parametrize("name", FILES)
def test_accelerate_takes_every_key_and_value_of_the_file(name):
    load_config_from_file(str(FILES[name]))  # unknown keys at the top are refused by it
    content = yaml.safe_load(FILES[name].read_text("utf-8"))
    args = launcher(name)
    for key, value in content.items():
        if key not in ("compute_environment", "distributed_type"):
            assert getattr(args, key) == value, key  # AttributeError: the launcher knows no such key
    assert args.multi_gpu and not args.use_fsdp and not args.use_deepspeed
    # a file's precision would overrule a T4's float16, or be overruled: the recipe's dtype alone decides
    assert args.mixed_precision == "no" and "mixed_precision" not in content


@pytest.mark.parametrize("name", FILES)
def test_the_header_is_the_command_and_says_what_it_is_for(name):
    header = "".join(line for line in FILES[name].read_text("utf-8").splitlines(True) if line.startswith("#"))
    joined = re.sub(r" \\\n#\s+", " ", header)
    command = rf"accelerate launch --config_file recipes/accelerate/{name}\.yaml .*-m orpo_lite\.train --recipe NAME"
    assert re.search(command, joined)
    assert "\n# Needs: " in header and "\n# When: " in header
    assert all(len(line) <= 120 for line in header.splitlines())


@pytest.mark.parametrize("name", [name for name in FILES if name.endswith("-multinode")])
def test_several_machines_meet_at_the_first(name):
    where = ["--main_process_ip", "10.0.0.1", "--main_process_port", "29511"]
    for rank in (0, 1):
        args = launcher(name, *where, "--machine_rank", str(rank), "--num_machines", "4", "--num_processes", "32")
        prepare_multi_gpu_env(args)  # sets what torchrun is given
        torchrun = _filter_args(args, get_args_parser(), ["--training_script", args.training_script])
        config, _, _ = config_from_args(torchrun)
        assert (config.min_nodes, config.max_nodes, config.nproc_per_node) == (4, 4, 8)
        assert config.rdzv_endpoint == "10.0.0.1:29511" and config.rdzv_configs["rank"] == rank


def test_the_wheel_ships_them():
    wheel = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["hatch"]["build"]["targets"]["wheel"]
    assert wheel["force-include"]["recipes"] == "orpo_lite/recipe/shipped"  # folders below it come along
    assert (ROOT / "recipes" / "accelerate").is_dir() and not (ROOT / "recipes" / "accelerate").is_symlink()


def start(folder: Path, file: str, *words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(FILES[file]), *words]
    command += ["-m", "orpo_lite.train", "--recipe", "quickstart", "training.max_steps=2", "training.eval_strategy=no"]
    command += ["evaluation.samples=0", f"training.output_dir={folder / 'run'}"]
    settings = os.environ | {"PYTHONPATH": str(ROOT), "ACCELERATE_USE_CPU": "1", "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=settings, cwd=folder
    )


def free_port() -> str:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return str(found.getsockname()[1])


@pytest.mark.slow
@pytest.mark.parametrize("file", ["ddp", "ddp-multinode"])
def test_two_processes_of_a_launch_train_the_quickstart(file, tmp_path):
    """On one machine, and as two machines of one process each, both of them this one."""
    port = ["--main_process_port", free_port()]
    machines: list[list[str]] = [port]
    if file == "ddp-multinode":
        where = [*port, "--main_process_ip", "127.0.0.1", "--num_machines", "2", "--num_processes", "2"]
        machines = [[*where, "--machine_rank", str(rank)] for rank in (0, 1)]
    started = [start(tmp_path, file, *words) for words in machines]
    told = [process.communicate(timeout=400) for process in started]
    for process, (_, errors) in zip(started, told, strict=True):
        assert process.returncode == 0, errors[-3000:]
    said = "".join(out for out, _ in told)
    assert "x 2 processes" in said and said.count("run folder") == 1
    assert json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))["steps"] == 2
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()


# ---- SLURM -----------------------------------------------------------------------------------------------------------

SLURM = recipes_folder() / "launch" / "slurm.sh"
SCONTROL = """#!/usr/bin/env bash
echo "scontrol $*" >> "$CALLS"
[ "$1" = show ] && printf 'localhost\\nother-node\\n'
exit 0
"""


def job(folder: Path, srun: str, **variables: str) -> dict[str, str]:
    """Environment of a SLURM job whose programs are ours, and write down how they were called."""
    for name, text in (("scontrol", SCONTROL), ("srun", f"#!/usr/bin/env bash\n{srun}\n")):
        (folder / name).write_text(text, "utf-8")
        (folder / name).chmod(0o755)
    (folder / "calls").touch()
    programs = [str(folder), str(Path(sys.executable).parent), os.environ["PATH"]]
    given = {
        "SLURM_JOB_ID": "4242",
        "SLURM_JOB_NODELIST": "node[1-2]",
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "2",
    }
    return os.environ | given | {"PATH": os.pathsep.join(programs), "CALLS": str(folder / "calls")} | variables


@pytest.mark.parametrize("file", [None, "ddp-multinode"])
def test_slurm_starts_one_launcher_a_node(file, tmp_path):
    variables = {"ACCELERATE_CONFIG": str(FILES[file])} if file else {}
    settings = job(
        tmp_path, 'echo "$MASTER_ADDR $OMP_NUM_THREADS srun $*" >> "$CALLS"', SLURM_CPUS_PER_TASK="8", **variables
    )
    settings.pop("OMP_NUM_THREADS", None)
    done = subprocess.run(
        [SLURM, "--recipe", "quickstart", "data.seed=1"], env=settings, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    asked, started = (tmp_path / "calls").read_text("utf-8").splitlines()
    assert asked == "scontrol show hostnames node[1-2]"
    assert started.startswith("localhost 4 srun --kill-on-bad-exit=1 ")
    assert started.endswith(" -m orpo_lite.train --recipe quickstart data.seed=1")
    _, _, _, _, *command = started.split()
    if file:
        assert command[:2] == ["accelerate", "launch"]
        args = launch_command_parser().parse_args(command[2:])
        assert (args.num_machines, args.num_processes, args.main_process_ip) == (2, 4, "localhost")
    else:
        assert command[0] == "torchrun"
        args = get_args_parser().parse_args(command[1:])
        assert (args.nnodes, args.nproc_per_node, args.rdzv_endpoint) == ("2", "2", "localhost:24242")
    assert args.rdzv_backend == "c10d" and args.max_restarts == 3


def test_slurm_puts_a_job_that_was_asked_to_stop_into_the_queue_again(tmp_path):
    settings = job(tmp_path, 'trap "exit 143" TERM; touch "$CALLS.started"; while true; do sleep 0.05; done')
    running = subprocess.Popen([SLURM, "--recipe", "quickstart"], env=settings, stdout=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "calls.started").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    running.terminate()
    said, _ = running.communicate(timeout=60)
    assert running.returncode == 143 and "goes into the queue again" in said
    assert (tmp_path / "calls").read_text("utf-8").splitlines()[-1] == "scontrol requeue 4242"


def test_slurm_does_not_queue_a_run_that_failed(tmp_path):
    done = subprocess.run([SLURM, "--recipe", "x"], env=job(tmp_path, "exit 2"), capture_output=True, text=True)
    assert done.returncode == 2 and "requeue" not in (tmp_path / "calls").read_text("utf-8")


@pytest.mark.slow
def test_slurm_trains_the_quickstart(tmp_path):
    """What the script starts on a node really trains: one node of two processes."""
    settings = job(tmp_path, 'shift; exec "$@"', SLURM_JOB_NUM_NODES="1", ACCELERATE_USE_CPU="1", OMP_NUM_THREADS="1", PYTHONPATH=str(ROOT))  # fmt: skip
    words = ["training.max_steps=2", "training.eval_strategy=no", "evaluation.samples=0"]
    command = [SLURM, "--recipe", "quickstart", *words, f"training.output_dir={tmp_path / 'run'}"]
    done = subprocess.run(command, env=settings, capture_output=True, text=True, cwd=tmp_path, timeout=400)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "x 2 processes" in done.stdout
    assert (tmp_path / "run" / "adapter_model.safetensors").is_file()
