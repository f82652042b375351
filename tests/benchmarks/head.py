"""`python -m tests.benchmarks.head --recipe NAME`: the output head alone, against full logits and TRL's and Liger's kernels."""

from __future__ import annotations

import contextlib
import json
import statistics
from collections.abc import Callable
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from torch import Tensor

from orpo_lite.common.console import console, run_command
from orpo_lite.data.collate import LABEL_FIELDS, PackedCollator, PaddedCollator
from orpo_lite.model.inspection import unwrap
from orpo_lite.objective.head import HeadTransform, token_logps
from orpo_lite.objective.loss import orpo_loss, pair_statistics, window_loss
from orpo_lite.recipe import Recipe
from orpo_lite.train.bench import Contest, interleaved, peak_over, ratios
from tests.benchmarks.random_model import random_model

ROWS, PAIRS, CHUNK = 2048, 4, 256
"""Label rows as 4 pairs of 2 x 256 tokens."""


def race_heads(model: Any, repeats: int) -> dict[str, Any]:
    """Race forward and backward of the ORPO loss of 2,048 label rows through a frozen head, from the hidden states on."""
    weight: Tensor = model.get_output_embeddings().weight.detach()
    if not weight.is_floating_point():
        return {
            "shape": "quantized head",
            "chunk": CHUNK,
            "contestants": {},
            "absent": {"all": "the head is quantized"},
        }
    transform = HeadTransform.of(model.config)
    g = torch.Generator(weight.device).manual_seed(0)
    hidden = torch.randn(ROWS, weight.shape[1], device=weight.device, dtype=weight.dtype, generator=g) * 0.5
    labels = torch.randint(len(weight), (ROWS,), device=weight.device, generator=g)
    losses = {
        "ours": lambda h: loss_of(token_logps(h, weight, labels, None, transform.softcap, transform.scale, CHUNK)),  # type: ignore[arg-type]
        "full logits": lambda h: loss_of(full_logits(h, weight, labels, transform)),
    }
    absent: dict[str, str] = {}
    try:
        from trl.kernels import ChunkedLogProbFunction

        chunk = 32768  # columns of the vocabulary, as TRL sets it
        losses["trl"] = lambda h: loss_of(
            ChunkedLogProbFunction.apply(h, weight, None, labels, 1.0, chunk, transform.softcap, transform.scale, ())[0]
        )
    except ImportError as error:
        absent["trl"] = str(error)
    contestants = race({name: (hidden, loss) for name, loss in losses.items()}, repeats)
    shape_said = f"N={ROWS}, H={weight.shape[1]}, V={len(weight)}, {str(weight.dtype).removeprefix('torch.')}"
    return {"shape": shape_said, "chunk": CHUNK, "contestants": contestants, "absent": absent}


def race(losses: dict[str, tuple[Tensor, Callable[[Tensor], Tensor]]], repeats: int) -> dict[str, Any]:
    """Race forward and backward of each loss from its hidden states, after a check that the losses agree."""
    works: dict[str, Callable[[], float]] = {}
    for name, (hidden, loss) in losses.items():

        def work(hidden: Tensor = hidden, loss: Callable[[Tensor], Tensor] = loss) -> float:
            value = loss(hidden.clone().requires_grad_())
            value.backward()
            return value.item()

        works[name] = work
    values = {name: work() for name, work in works.items()}
    if max(values.values()) - min(values.values()) > 1e-2:
        raise RuntimeError(f"the heads' losses differ, so the times cannot be compared: {values}")
    device = next(iter(losses.values()))[0].device
    peaks = {name: peak_over(work, device) for name, work in works.items()}
    seconds = interleaved(works, repeats)
    contestants: dict[str, Any] = {}
    for name in works:
        contestants[name] = {"seconds": seconds[name], "peak_bytes": peaks[name]}
        if name != "ours":
            contestants[name]["ours_time_share"] = ratios(seconds["ours"], seconds[name])
            contestants[name]["ours_memory_share"] = peaks["ours"] / peaks[name]
    return contestants


def race_liger(model: Any, pairs: list[dict[str, Any]], repeats: int) -> dict[str, Any] | str:
    """Race our head and loss against Liger's fused ORPO on the same pairs: it takes them padded, ours shared.

    Returns:
        The contestants, or why there is no race.
    """
    weight: Tensor = model.get_output_embeddings().weight.detach()
    transform = HeadTransform.of(model.config)
    if not weight.is_floating_point() or transform.softcap or transform.scale != 1.0:
        return "its loss knows no quantized head, no softcap and no scale"
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearORPOLoss  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        return f"{error} (pip install --no-deps liger-kernel)"
    count, device = len(pairs), weight.device
    padded = {key: value.to(device) for key, value in PaddedCollator(0)(pairs).items()}
    packed = PackedCollator()(pairs)
    length = padded["input_ids"].shape[1]
    g = torch.Generator(device).manual_seed(0)
    hidden = torch.randn(2 * count, length, weight.shape[1], device=device, dtype=weight.dtype, generator=g) * 0.5
    place = []
    for i, (_, prefix, chosen, rejected) in enumerate(packed["segments"]):
        hidden[count + i, :prefix] = hidden[i, :prefix]  # a prefix has the same hidden states in both sequences
        place += [i * length + t for t in range(prefix + chosen)]
        place += [(count + i) * length + t for t in range(prefix, prefix + rejected)]
    target, nll_target = (torch.full((2 * count * length,), -100, device=device) for _ in range(2))
    answers, scope = (padded["chosen_pair"] >= 0) | (padded["rejected_pair"] >= 0), padded["nll_pair"] >= 0
    target[padded["label_rows"][answers]] = padded["label_ids"][answers]
    nll_target[padded["label_rows"][scope]] = padded["label_ids"][scope]
    fused = LigerFusedLinearORPOLoss(compiled=weight.is_cuda)
    batch = {key: packed[key].to(device) for key in LABEL_FIELDS}

    def ours(rows: Tensor) -> Tensor:
        logps, means = token_logps(rows[batch["label_rows"]], weight, batch["label_ids"], chunk=CHUNK, with_means=True)
        stats = pair_statistics(logps, means, batch["chosen_pair"], batch["rejected_pair"], batch["nll_pair"], count)
        return window_loss(stats, 0.1, stats.nll_count.sum(), count)

    def liger(states: Tensor) -> Tensor:
        shape = (2 * count, length)
        return fused(weight, states, target.view(shape), nll_target=nll_target.view(shape))[0]

    shared = hidden.flatten(0, 1)[torch.tensor(place, device=device)]
    return race({"ours": (shared, ours), "liger": (hidden, liger)}, repeats)


def loss_of(logps: Tensor) -> Tensor:
    """Compute the ORPO loss of the rows as pairs: the first half of the sequences is chosen, each row a label of an answer."""
    chosen, rejected = logps.view(2, PAIRS, -1).mean(-1)
    return orpo_loss(chosen, rejected, -chosen.mean())


def full_logits(hidden: Tensor, weight: Tensor, labels: Tensor, transform: HeadTransform) -> Tensor:
    """Compute log-probs as a plain implementation does: all logits in float32, then a log-softmax."""
    z = F.linear(hidden, weight).float() * transform.scale
    if transform.softcap:
        z = torch.tanh(z / transform.softcap) * transform.softcap
    return z.log_softmax(-1).gather(1, labels[:, None]).squeeze(1)


def show(title: str, contestants: dict[str, Any]) -> None:
    """Print the contestants as a table."""
    from rich.table import Table

    console.print(f"\n{title}, forward and backward:")
    table = Table("", "seconds", "MB", "ours takes, of its time", "of its memory", box=None)
    for name, c in contestants.items():
        share = c.get("ours_time_share")
        table.add_row(name, f"{statistics.median(c['seconds']):.2f}", f"{c['peak_bytes'] / 1e6:,.0f}",
                      f"{share['median']:.2f} ({share['min']:.2f} to {share['max']:.2f})" if share else "",
                      f"{c['ours_memory_share']:.3f}" if share else "")  # fmt: skip
    console.print(table)


def command(
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, path of a YAML file, or run folder")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    repeats: Annotated[int, typer.Option(help="repeats of each measurement, the contestants in turn")] = 5,
    layers: Annotated[
        int | None, typer.Option(help="take a random model of the base's shape with this many layers")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Time the output head of a recipe's model against full logits, TRL's kernel and Liger's loss."""
    chosen = Recipe.load(recipe, overrides or [])
    with random_model(chosen, layers) if layers else contextlib.nullcontext(chosen) as spec:
        contest = Contest(spec, 4, [], False)
        heads = race_heads(unwrap(contest.model), repeats)
        liger = race_liger(unwrap(contest.model), contest.rows, repeats)
    if as_json:
        print(json.dumps({"head": heads, "liger": liger}, indent=1))
        return
    show(f"head alone, {heads['shape']}, chunk {heads['chunk']}", heads["contestants"])
    for name, why in heads["absent"].items():
        console.print(f"{name}: not compared, {why}")
    if isinstance(liger, str):
        console.print(f"liger: not compared, {liger}")
    else:
        show("head and loss of 4 pairs: ours shared, Liger's padded", liger)


if __name__ == "__main__":
    run_command(command)
