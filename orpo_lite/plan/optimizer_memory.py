"""Memory of the optimizer that a recipe names: bytes of state, where they live, and what a step takes for itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from torch import Tensor

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest

STATES = {"adamw": 2, "adam": 2, "lamb": 2, "ademamix": 3, "lion": 1, "rmsprop": 1, "adagrad": 1, "sgd": 0,
          "stable_adamw": 2, "schedule_free_adamw": 2, "schedule_free_radam": 2, "schedule_free_sgd": 1}  # fmt: skip
"""Numbers an optimizer keeps for each trained one, by the family's name."""
SMALL_8BIT, BLOCK_8BIT, CODES = 4096, 256, 2 * 256 * 4
"""bitsandbytes keeps 32-bit states for smaller tensors, one float32 scale a block, and two tables of codes."""
SMALL_PAGED = 100_000
"""bitsandbytes pages only tensors of at least as many numbers."""


@dataclass(frozen=True)
class States:
    """Bytes of an optimizer."""

    device: int
    """On the card, at all times once the first step is done."""
    host: int
    """Paged: in the host's memory, moved to the card for a step where there is room."""
    step: int
    """On the card during a step only."""
    why: str


def states(optim: str, trained: Iterable[Tensor], cuda: bool) -> States:
    """States of one of transformers' optimizers over trained float32 tensors.

    Args:
        optim: a name of TrainingArguments.optim.
        cuda: whether it runs on a GPU: on the CPU there is no paging, and 8-bit optimizers give way to adamw_torch.

    Raises:
        RequestError: an optimizer whose states are not known here.
    """
    trained = list(trained)
    sizes = [tensor.numel() for tensor in trained]
    if "8bit" in optim and not cuda:
        optim = "adamw_torch"
    paged = optim.startswith("paged_") and cuda
    family = optim.removeprefix("paged_")
    for ending in ("_8bit", "_32bit", "_bnb", "_torch_fused", "_torch", "_apex_fused", "_anyprecision"):
        family = family.removesuffix(ending)
    if family == "adafactor":
        # one row and one column a matrix; a whole vector otherwise
        rows = sum(sum(t.shape) if t.ndim > 1 else t.numel() for t in trained)
        return States(4 * rows, 0, 4 * max(sizes, default=0), "adafactor: a row and a column a matrix")
    if family not in STATES:
        raise RequestError(
            f"training.optim: the states of {optim} are not known, so it cannot be planned{nearest(family, STATES)}; known: "
            f"{', '.join(STATES)}, with _8bit, paged_ and _torch as transformers writes them"
        )
    count = STATES[family]
    device = host = 0
    for size in sizes:
        if "8bit" in optim and size >= SMALL_8BIT:
            held = count * (size + 4 * -(-size // BLOCK_8BIT))
        else:
            held = count * 4 * size
        if paged and size >= SMALL_PAGED:
            host += held
        else:
            device += held
    if "8bit" in optim:
        device += CODES
    # torch's plain AdamW takes the square roots of all second moments at once on a GPU
    step = 4 * sum(sizes) if optim in ("adamw_torch", "adam_torch") and cuda else 0
    bits = "8" if "8bit" in optim else "32"
    why = f"{optim}: {count} {bits}-bit states" + (", paged in the host's memory" if paged else "")
    return States(device, host, step, why)
