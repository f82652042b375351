"""`python -m tests.benchmarks.trl_memory --recipe NAME [key=value ...]`: plan TRL's training step beside ours.

TRL's own code runs on meta tensors with the same pairs, base, adapter and optimizer. It differs in memory because it pads
both completions with their prompt (no shared prompt), keeps logits of the whole vocabulary at every position, which
accelerate converts to float32 where the model computes in 16 bits, and checkpoints all layers or none.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import warnings
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from types import SimpleNamespace
from typing import Annotated, Any
from unittest import mock

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import Tensor
from trl.trainer import utils as trl_utils

from orpo_lite.common.console import console, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.plan.allocations import HEAD, PARTS
from orpo_lite.plan.gpus import FITS, SIZES, Target, find_cards, verdict
from orpo_lite.plan.predict import Plan, Study
from orpo_lite.plan.step import META, Shape
from orpo_lite.plan.tables import gigabytes
from orpo_lite.recipe import Recipe
from orpo_lite.trainer.trl_names import trl_columns
from tests.plans import plan

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # that it is experimental
    from trl.experimental.orpo import ORPOTrainer as TrlTrainer
    from trl.experimental.utils import DPODataCollatorWithPadding

VERSION = importlib.metadata.version("trl")


class TrlPasses(TrlTrainer):
    """TRL's collator and loss over a model on the meta device, with only the attributes that the loss uses."""

    def __init__(self, model: Any, recipe: Recipe, transform: Any, attention: Any, cuda: bool) -> None:
        self.model = model
        self.cuda = cuda
        self.beta = recipe.orpo.beta
        self.is_encoder_decoder, self.padding_value = False, 0
        self.args = SimpleNamespace(device=META)  # type: ignore[assignment]
        self.accelerator = SimpleNamespace(device=META, gather_for_metrics=number)  # type: ignore[assignment]
        self.aux_loss_enabled = getattr(model.config, "output_router_logits", False)
        self.aux_loss_coef = getattr(model.config, "router_aux_loss_coef", 0.0)
        self._peft_has_been_casted_to_bf16 = False
        self._stored_metrics = defaultdict(lambda: defaultdict(list))

    def batch(self, shape: Shape, recipe: Recipe, layout: str) -> dict[str, Any]:
        """Collate the pairs of a shape as TRL pads them."""
        return DPODataCollatorWithPadding(pad_token_id=0)([trl_columns(row) for row in shape.rows])

    def loss(self, batch: dict[str, Any]) -> Tensor:
        """Compute the loss of a micro-batch."""
        with fused_kernel() if self.cuda else contextlib.nullcontext():
            loss = self.compute_loss(self.model, batch)
        assert isinstance(loss, Tensor)
        return loss


def number(tensor: Tensor) -> Tensor:
    """Replace a metric's tensor by one with values: TRL reads its metrics, and nothing depends on them."""
    return torch.zeros(tensor.shape)


class FusedLogProbs(torch.autograd.Function):
    """Stand-in for TRL's Triton kernel for log-probabilities; by its source it keeps four numbers per row, and a gradient
    like the logits."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        logps, entropy, log_z, expected = (logits.new_empty(index.shape, dtype=torch.float32) for _ in range(4))
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(logits, index, log_z, expected)
        return logps, entropy

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor, None]:
        return torch.empty_like(ctx.saved_tensors[0], memory_format=torch.contiguous_format), None


@contextlib.contextmanager
def fused_kernel() -> Iterator[None]:
    """Make TRL use its CUDA kernel for meta tensors, in the versions that have one."""
    if not hasattr(trl_utils, "_supports_trl_loss_kernel"):
        yield
        return

    def fused(logits: Tensor, index: Tensor, **_: Any) -> tuple[Tensor, Tensor]:
        return FusedLogProbs.apply(logits, index)  # type: ignore[return-value]

    with (
        mock.patch.object(trl_utils, "is_triton_available", lambda: True),
        mock.patch.object(trl_utils, "_supports_trl_loss_kernel", lambda *_: True),
        # imported there only where Triton is
        mock.patch.object(trl_utils, "_fused_logprob_entropy", fused, create=True),
    ):
        yield


def plan_trl(recipe: Recipe, ours: Plan, *, whole: bool = False) -> Plan:
    """Predict the peak memory of TRL's training step on the micro-batch of one of our plans.

    Base, adapter, optimizer, card and dtype are those of the plan; all layers checkpoint if any does there. There is
    no evaluation phase.

    Args:
        recipe: the recipe that `ours` plans.
        whole: run every layer instead of extrapolating a deep model from a few.

    Raises:
        RequestError: a model that TRL's step cannot be planned for.
    """
    recomputed = 0 if ours.recomputed == "no layer" else None
    theirs = recipe.model_copy(
        update={
            "data": recipe.data.model_copy(update={"eval": None, "eval_fraction": 0.0}),
            "orpo": recipe.orpo.model_copy(update={"layout": "padded"}),
            "memory": recipe.memory.model_copy(update={"offload_activations": False}),
        }
    )
    cuda = ours.target.kind == "cuda"
    try:
        with mock.patch("orpo_lite.plan.step.Passes", lambda *given: TrlPasses(*given, cuda=cuda)):
            study = Study(theirs, ours.target, lambda *_: ours.shape)
            if whole:
                study._stacks = None
            made = study.plan(recomputed)
    except NotImplementedError as error:
        raise RequestError(
            f"the step of TRL {VERSION} with {recipe.model.name_or_path} cannot be planned: {error}"
        ) from error
    return replace(
        made, layout_why="TRL pads, and repeats the prompt", assumptions=[*made.assumptions, *assumptions(cuda)]
    )


def assumptions(cuda: bool) -> list[str]:
    """List what is assumed of TRL's step in addition to ours, in sentences."""
    found = [
        "TRL: base, adapter and optimizer as here; given a peft_config instead of a model with its adapter, TRL holds the "
        "embeddings, head and norms of a quantized base in float32, and with bf16 the adapter in 16 bits",
        "TRL: no completion of the micro-batch is padded",
    ]
    if cuda:
        found.append("TRL: log-probabilities by its Triton kernel, by that one's source; without Triton it takes more")
    return found


# ---- side by side ----------------------------------------------------------------------------------------------------


def training_step(made: Plan) -> Plan:
    """Leave out the plan's evaluation, since TRL's has none."""
    return replace(made, phases={name: parts for name, parts in made.phases.items() if name != "evaluation"})


def as_dict(ours: Plan, theirs: Plan) -> dict[str, Any]:
    """Return TRL's plan as plain numbers (bytes) and words, beside ours."""
    ours = training_step(ours)
    return {
        "version": VERSION,
        **theirs.as_dict(),
        "ours": {"peak_bytes": ours.peak, "needed_bytes": ours.needed, "fullest_phase": ours.fullest},
        "times_ours": {"peak": theirs.peak / ours.peak, "needed": theirs.needed / ours.needed},
    }


def show(console: Console, ours: Plan, theirs: Plan) -> None:
    """Print both training steps by phase and purpose, and their peaks."""
    ours = training_step(ours)
    sides, phases = {"ours": ours, "TRL's": theirs}, ("forward", "backward")
    console.print(f"\nTRL {VERSION} on the same micro-batch, padded, {theirs.recomputed} checkpointed:")
    table = Table("GB (10^9 bytes)", *(f"{phase}\n{who}" for phase in phases for who in sides), box=None)
    for column in table.columns[1:]:
        column.justify = "right"
    names = {HEAD: "head, logits and loss"}
    for part in PARTS:
        sizes = [made.phases[phase][part] for phase in phases for made in sides.values()]
        if any(size >= 5e6 for size in sizes):
            table.add_row(names.get(part, part), *(gigabytes(size) if size >= 5e6 else "" for size in sizes))
    totals = [gigabytes(made.phases[phase].total()) for phase in phases for made in sides.values()]
    table.add_row("[bold]in tensors[/]", *totals)
    console.print(table)
    for who, made in sides.items():
        card = next((card.name for card in SIZES if verdict(made, card) == FITS), "none of 80 GB and less")
        console.print(
            f"{who}: peak {gigabytes(made.peak)} GB in tensors, in the {made.fullest} phase; {gigabytes(made.needed)} GB with "
            f"what is assumed; smallest card: {card}"
        )
    console.print(f"[bold]TRL takes {theirs.peak / ours.peak:.2f} times our memory in tensors[/]")
    for sentence in theirs.assumptions:
        if sentence not in ours.assumptions:
            console.print(f"assumed: {sentence}", style="dim")


def command(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, path of a YAML file, or run folder")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.max_length=2048")] = None,
    gpu: Annotated[str | None, typer.Option(help="a card such as t4; cpu plans for the CPU")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables (bytes)")] = False,
) -> None:
    """Plan the training step of TRL's ORPOTrainer and ours, on the same pairs."""
    loaded = Recipe.load(recipe, overrides or [])
    target = Target("cpu") if gpu == "cpu" else find_cards(gpu)[0].target if gpu else Target("cuda")
    ours = plan(loaded, target)
    theirs = plan_trl(loaded, ours)
    if as_json:
        print(json.dumps(as_dict(ours, theirs), indent=1))
    else:
        show(console, ours, theirs)


if __name__ == "__main__":
    run_command(command)
