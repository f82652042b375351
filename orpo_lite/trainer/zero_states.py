"""DeepSpeed's masters and optimizer states whole, in a checkpoint beside its own files, which are cut for one number of processes."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from orpo_lite.common.errors import RequestError
from orpo_lite.trainer.checkpoint_folder import manifest

WHOLE = "whole_states.safetensors"
"""Of a checkpoint: `NAME/master` and `NAME/KEY` for each trained weight, float32; numbers as JSON in its metadata."""


def cut_for_another(checkpoint: Path, processes: int) -> bool:
    """Whether another number of processes has written it."""
    try:
        return manifest(checkpoint)["processes"] != processes
    except ValueError:  # none of ours, or damaged, which is said elsewhere
        return False


def check(checkpoint: Path, processes: int, what: str = "") -> None:
    """Raise RequestError where a checkpoint of DeepSpeed is cut for another number of processes, and not whole as well."""
    if cut_for_another(checkpoint, processes) and not (checkpoint / WHOLE).is_file():
        raise RequestError(
            f"{checkpoint}{what}: was written by {manifest(checkpoint)['processes']} processes of DeepSpeed, here are {processes}: "
            f"its optimizer states are cut for that number, and it has no {WHOLE} (there is one with an adapter and an optimizer "
            "such as AdamW, not an 8-bit one); go on with as many, or with FSDP2 or DDP from the start"
        )


@torch.no_grad()
def write(engine: Any, file: Path, keep: bool) -> None:
    """Gather what an engine of ZeRO trains and write it; nothing where its optimizer keeps states of other shapes.

    All processes call it together; each tensor is gathered by itself.

    Args:
        keep: whether this process writes the file.

    Raises:
        OSError: the disk is full or gone.
    """
    flats = _flats(engine)
    if not flats:
        return
    zero, base, scheduler = engine.optimizer, engine.optimizer.optimizer, engine.lr_scheduler
    states = [dict(base.state.get(flat, {})) for flat in flats]
    step = [state.pop("step", None) for state in states][0]
    keys = sorted(key for key, value in states[0].items() if value is not None)
    for flat, state in zip(flats, states, strict=True):
        kept = {key: value for key, value in state.items() if value is not None}
        if sorted(kept) != keys or not all(_shaped(value, flat) for value in kept.values()):
            return
    facts = {
        "optimizer": type(base).__name__,
        "keys": keys,
        "step": float(step) if torch.is_tensor(step) else step,  # torch's counts are tensors, DeepSpeed's integers
        "groups": [{key: value for key, value in group.items() if key != "params"} for group in base.param_groups],
        "engine": {name: getattr(engine, name) for name in ("global_steps", "global_samples", "skipped_steps")},
        "scaler": {key: value for key, value in vars(zero.loss_scaler).items() if isinstance(value, (int, float))},
        "scheduler": scheduler.state_dict() if scheduler is not None else None,
    }
    try:
        metadata = {"facts": json.dumps(facts)}
    except TypeError:  # of a group or a scheduler of somebody's own
        return
    from deepspeed import utils  # pyright: ignore[reportMissingImports]

    if keys and not _three(engine):
        zero._lazy_init_hp_params_optimizer_state()  # DeepSpeed does it with the first step, which may have been skipped
    found: dict[str, Tensor] = {}
    for name, parameter in engine.module.named_parameters():
        for key in ("master", *keys) if parameter.requires_grad else ():
            get = utils.safe_get_full_fp32_param if key == "master" else utils.safe_get_full_optimizer_state
            whole: Any = get(parameter, *([] if key == "master" else [key]))
            if keep:
                found[f"{name}/{key}"] = whole.to("cpu", copy=True).contiguous()
    if keep:
        save_file(found, file, metadata)


@torch.no_grad()
def restore(engine: Any, file: Path) -> None:
    """Set an engine of ZeRO, of any number of processes, to what `write` has written. All processes call it together.

    Raises:
        RequestError: the file is of another optimizer or other weights.
    """
    zero, base = engine.optimizer, engine.optimizer.optimizer
    trained = {name: p for name, p in engine.module.named_parameters() if p.requires_grad}
    with safe_open(file, "pt") as stored:
        facts = json.loads(stored.metadata()["facts"])
        keys = ("master", *facts["keys"])
        there = {name: tuple(stored.get_slice(name).get_shape()) for name in stored.keys()}  # noqa: SIM118
        here = {f"{name}/{key}": tuple(getattr(p, "ds_shape", p.shape)) for name, p in trained.items() for key in keys}
        if facts["optimizer"] != type(base).__name__ or there != here:
            odd = sorted(set(there.items()) ^ set(here.items()))
            raise RequestError(
                f"{file}: found states of {facts['optimizer']} and {len(there)} tensors, expected {type(base).__name__} and "
                f"{len(here)}{f' (first of those that differ: {odd[0][0]})' if odd else ''}: go on with the settings of that run"
            )
        _begin(engine, facts)
        for name, parameter in trained.items():
            for key in keys:
                _set(parameter, stored.get_tensor(f"{name}/{key}"), key)
    if _three(engine):
        for number in range(len(_flats(engine))):
            zero._reassign_or_swap_out_partitioned_parameters(number)
        zero.checkpoint_event_epilogue()
    else:
        zero.update_lp_params()
    for group, numbers in zip(base.param_groups, facts["groups"], strict=True):
        group.update({key: tuple(value) if isinstance(value, list) else value for key, value in numbers.items()})
    vars(engine).update(facts["engine"])
    vars(zero.loss_scaler).update(facts["scaler"])
    if facts["scheduler"] is not None and engine.lr_scheduler is not None:
        engine.lr_scheduler.load_state_dict(facts["scheduler"])


def _begin(engine: Any, facts: dict[str, Any]) -> None:
    """Give an optimizer that has not taken a step yet its states, to be filled."""
    zero, base, step = engine.optimizer, engine.optimizer.optimizer, facts["step"]
    on_card = any(group.get("fused") or group.get("capturable") for group in base.param_groups)
    for flat in _flats(engine):
        for key in facts["keys"]:
            base.state[flat].setdefault(key, torch.zeros_like(flat))
        if step is not None:
            count = torch.tensor(step, device=flat.device if on_card else "cpu") if isinstance(step, float) else step
            base.state[flat]["step"] = count
    if _three(engine):
        zero.checkpoint_event_prologue()  # weights that stay whole as well are cut up, and made anew afterwards
    else:
        zero._lazy_init_hp_params_optimizer_state()


def _set(parameter: Any, value: Tensor, key: str) -> None:
    """This process's share of a master or of a state."""
    from deepspeed import utils  # pyright: ignore[reportMissingImports]

    last = [] if key == "master" else [key]
    if hasattr(parameter, "ds_id"):
        # the last share is padded, which DeepSpeed's function for whole values (0.19) is not up to
        share, group = parameter.partition_numel(), parameter.ds_process_group
        padded = value.new_zeros(share * torch.distributed.get_world_size(group))
        padded[: value.numel()] = value.flatten()
        mine = padded.narrow(0, share * torch.distributed.get_rank(group), share)
        (utils.safe_set_local_optimizer_state if last else utils.safe_set_local_fp32_param)(parameter, mine, *last)
    else:
        (utils.safe_set_full_optimizer_state if last else utils.safe_set_full_fp32_param)(parameter, value, *last)


def _three(engine: Any) -> bool:
    return hasattr(engine.optimizer, "fp32_partitioned_groups_flat")


def _flats(engine: Any) -> list[Tensor]:
    """This process's shares of the masters, one tensor a group; none where no optimizer of ZeRO holds them in memory."""
    zero = engine.optimizer
    if getattr(zero, "swap_optimizer", False):
        return []
    name = "fp32_partitioned_groups_flat" if _three(engine) else "single_partition_of_fp32_groups"
    return list(getattr(zero, name, []))


def _shaped(value: Any, flat: Tensor) -> bool:
    return torch.is_tensor(value) and value.shape == flat.shape and value.is_floating_point()
