"""`python -m tests.benchmarks.balance`: how long GPUs wait for the slowest of them, with steps dealt by cost and without.

The lengths of real pairs vary twenty-fold, and an optimizer step ends when the last GPU is done. What a pair takes is
`a + b * tokens + c * attention` seconds, measured (`--measure`): tokens as the layout counts them, attention as the
number of (query, key) places that are computed, so the sum of squares. Steps are those of the trainer's own `StepPlan`,
dealt by tokens and places (`data.lengths`), and by tokens alone; a plain sharded sampler gives each GPU the next pairs of the
same order.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import asdict, dataclass
from typing import Annotated, Any

import numpy as np
import typer

from orpo_lite.common.console import console, errors, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.data.lengths import place_weight, places
from orpo_lite.data.step_batches import StepPlan
from orpo_lite.recipe import Recipe

GPUS = (2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


@dataclass(frozen=True)
class Cost:
    """Seconds of forward and backward: of a micro-batch as such, of each token, of each (query, key) place."""

    micro_batch: float
    token: float
    attention: float

    def of(self, pairs: np.ndarray) -> np.ndarray:
        """Seconds of each pair, (N,), from its lengths (N, 3); without the micro-batch's own."""
        return self.token * pairs.sum(1) + self.attention * places(*pairs.T)


MEASURED = Cost(micro_batch=0.0435, token=2.46e-3, attention=8.1e-7)
"""`--measure` on one core of a shared machine, in the processor's own time: 6 layers of SmolLM2-135M's shape, float32, LoRA
on all linear layers, pairs of 64 to 1,800 tokens, fitted to within 11%. Only the ratios count. A model of 4,096 columns
computes 7 times as much for a token against a place of attention, and so is nearer to tokens alone."""


# ---- lengths ---------------------------------------------------------------------------------------------------------


def synthetic(pairs: int, seed: int = 0) -> np.ndarray:
    """Lengths such as UltraFeedback's, (N, 3) int64: prompt, chosen, rejected.

    Log-normal: prompts of 185 tokens on average (sigma 1.1: median 101), chosen answers of 310 and rejected ones of 290
    (sigma 0.75, correlated by 0.5). At most 2,048 tokens a side; others are drawn anew, as a recipe drops them.
    """
    random = np.random.default_rng(seed)
    kept: list[np.ndarray] = []
    while sum(map(len, kept)) < pairs:
        normal = random.standard_normal((pairs, 4))
        answers = np.sqrt(0.5) * (normal[:, 1:3] + normal[:, 3:])
        normal = np.column_stack([normal[:, 0], answers])
        mean, sigma = np.array([185, 310, 290]), np.array([1.1, 0.75, 0.75])
        drawn = np.exp(np.log(mean) - sigma**2 / 2 + sigma * normal).round().astype(np.int64) + 1
        kept.append(drawn[drawn[:, 0] + drawn[:, 1:].max(1) <= 2048])
    return np.concatenate(kept)[:pairs]


def recipe_lengths(recipe: Recipe) -> np.ndarray:
    """Lengths of a recipe's training pairs, (N, 3) int64."""
    from orpo_lite.data import load_pairs
    from orpo_lite.model import load_tokenizer
    from orpo_lite.plan.before_training import Lengths

    data = recipe.data.model_copy(update={"eval": None, "eval_fraction": 0.0})
    return Lengths.of(load_pairs(data, load_tokenizer(recipe.model)), False).train


# ---- simulation ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Waiting:
    """Shares of a step's time that the average GPU waits, max/mean - 1, as means over an epoch's steps."""

    gpus: int
    steps: int
    dealt: float
    by_tokens: float
    plain: float
    repeated: bool
    """Whether pairs were drawn with repetition, since they do not fill a step."""


def simulate(
    pairs: np.ndarray, gpus: int, weight: float, cost: Cost = MEASURED, each: int = 8, seed: int = 42
) -> Waiting:
    """The waiting of an epoch over pairs (N, 3), with so many GPUs and `each` pairs on every GPU.

    Args:
        weight: tokens that a place of attention counts as where pairs are dealt by work.
        cost: what they take.
    """
    per_step = gpus * each
    repeated = len(pairs) < per_step
    if repeated:
        pairs = pairs[np.random.default_rng(seed).integers(0, len(pairs), 2 * per_step)]
    seconds, tokens = cost.of(pairs), pairs.sum(1)
    work = tokens + np.round(weight * places(*pairs.T)).astype(np.int64)
    # as training deals them: each GPU has one micro-batch of so many pairs
    plans = [
        StepPlan(tokens, per_step, None, gpus, seed=seed, pairs_per_batch=each, work=costs) for costs in (work, tokens)
    ]
    order = plans[0].order(0)
    shares = np.empty((3, len(plans[0])))
    for step in range(len(plans[0])):
        for row, plan in zip(shares, plans, strict=False):
            taken = [sum(seconds[batch].sum() for batch in batches) for batches in plan.step(0, step)]
            row[step] = waiting(np.array(taken) + cost.micro_batch)
        mine = order[step * per_step : (step + 1) * per_step]
        # as accelerate's BatchSamplerShard: whole batches to one GPU after the other, filled up from the epoch's start
        mine = np.concatenate([mine, order[: per_step - len(mine)]])
        shares[2, step] = waiting(seconds[mine].reshape(gpus, each).sum(1) + cost.micro_batch)
    dealt, by_tokens, plain = shares.mean(1).tolist()
    return Waiting(gpus, len(plans[0]), dealt, by_tokens, plain, repeated)


def waiting(seconds: np.ndarray) -> float:
    """max/mean - 1 of the GPUs' times in a step."""
    return float(seconds.max() / seconds.mean() - 1)


def weight(layers: int = 6) -> float:
    """`place_weight` of the model whose cost is measured."""
    return place_weight(shape(layers))


def shape(layers: int) -> Any:
    """Configuration of SmolLM2-135M with so many layers."""
    from orpo_lite.plan.meta_model import shipped_config

    config: Any = shipped_config("HuggingFaceTB/SmolLM2-135M-Instruct")
    config.num_hidden_layers = layers
    return config


# ---- the cost, measured ----------------------------------------------------------------------------------------------

SHAPES = ((16, 24, 24), (64, 64, 64), (128, 128, 128), (256, 128, 128), (256, 256, 256), (512, 256, 256), (128, 512, 512),
          (1024, 128, 128), (512, 512, 512), (1400, 200, 200), (64, 900, 100))  # fmt: skip
"""Tokens of prompt, chosen and rejected of the pairs that are timed, alone; the small ones also by twos."""


def measure(layers: int = 6, repeats: int = 5) -> tuple[Cost, float, dict[str, Any]]:
    """Time forward and backward passes of a random model of SmolLM2-135M's shape, and fit `Cost` to them.

    Returns:
        The cost, the largest relative error of the fit, and what was measured: seconds (the lowest of the repeats, since
        other programs only ever add to them) by shape.
    """
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM

    from orpo_lite.model import attach_adapter, load_tokenizer
    from orpo_lite.plan.step import Shape
    from orpo_lite.recipe import AdapterSection
    from orpo_lite.train.bench import interleaved
    from orpo_lite.trainer.config import ORPOConfig
    from orpo_lite.trainer.trainer import ORPOTrainer

    tokenizer = load_tokenizer(Recipe.load("quickstart").model)
    model: Any = attach_adapter(
        AutoModelForCausalLM.from_config(shape(layers), dtype=torch.float32),
        AdapterSection(),
        tokenizer=tokenizer,
        checkpointing=False,
    )
    batches = {str(shape): [shape] for shape in SHAPES} | {f"2 x {shape}": [shape] * 2 for shape in SHAPES[:4]}
    with tempfile.TemporaryDirectory() as scratch:
        args = ORPOConfig(output_dir=scratch, layout="shared", report_to="none", gradient_checkpointing=False)
        first = Dataset.from_list(Shape(SHAPES[:1], "").rows)
        trainer = ORPOTrainer(model, args, None, first, None, tokenizer)

    def steps(shapes: list[tuple[int, int, int]]) -> Any:
        batch = trainer.data_collator(Shape(tuple(shapes), "").rows)

        def work() -> None:
            trainer.current_gradient_accumulation_steps = 1
            trainer.training_step(model, dict(batch))
            model.zero_grad()

        return work

    # on a CPU the processor's own time: other programs wait less in it than on the clock
    clock = time.perf_counter if args.device.type == "cuda" else time.process_time
    seconds = interleaved({name: steps(shapes) for name, shapes in batches.items()}, repeats, clock)
    taken = np.array([min(each) for each in seconds.values()])
    pairs = [np.array(shapes) for shapes in batches.values()]
    terms = np.array([[1.0, shapes.sum(), places(*shapes.T).sum()] for shapes in pairs])
    found = np.linalg.lstsq(terms / taken[:, None], np.ones(len(taken)), rcond=None)[0]
    error = float(np.abs(terms @ found / taken - 1).max())
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads"
    return Cost(*found.tolist()), error, {"device": device, "seconds": dict(zip(batches, taken.tolist(), strict=True))}


def command(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    recipe: Annotated[str | None, typer.Option(help="take the lengths of a recipe's training pairs")] = None,
    gpus: Annotated[str, typer.Option(help="numbers of GPUs")] = ",".join(map(str, GPUS)),
    pairs: Annotated[int, typer.Option(help="pairs a GPU and step")] = 8,
    drawn: Annotated[int, typer.Option(help="without --recipe: pairs of lengths like UltraFeedback's")] = 60_000,
    measured: Annotated[
        bool, typer.Option("--measure", help="measure the cost of pairs on this machine, some minutes, and take that")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
) -> None:
    """Simulate how long GPUs wait for each other in an epoch of optimizer steps."""
    counts = [int(word) if word.strip().isdigit() else 0 for word in gpus.split(",")]
    if not all(count > 1 for count in counts):
        raise RequestError(f"--gpus: found {gpus!r}, expected numbers from 2 on, such as 2,8,64")
    if pairs < 1 or drawn < 1:
        raise RequestError(f"--pairs and --drawn: found {pairs} and {drawn}, expected numbers above 0")
    if overrides and recipe is None:
        raise RequestError("key=value changes a recipe: give --recipe NAME as well")
    lengths = recipe_lengths(Recipe.load(recipe, overrides or [])) if recipe else synthetic(drawn)
    cost, facts = MEASURED, {}
    if measured:
        errors.print("measuring forward and backward passes")
        cost, error, facts = measure()
        facts["largest_error_of_the_fit"] = error
    rows = [simulate(lengths, count, weight(), cost, pairs) for count in counts]
    if as_json:
        told = {
            "pairs": len(lengths),
            "cost": asdict(cost),
            "measured": facts,
            "waiting": [asdict(row) for row in rows],
        }
        print(json.dumps(told, indent=1))
        return
    show(lengths, cost, facts, rows, pairs)


def show(lengths: np.ndarray, cost: Cost, facts: dict[str, Any], rows: list[Waiting], pairs: int) -> None:
    from rich.table import Table

    mean, top = lengths.mean(0), lengths.max(0)
    console.print(
        f"{len(lengths):,} pairs: prompt, chosen, rejected of {mean[0]:.0f}, {mean[1]:.0f}, {mean[2]:.0f} tokens on average, "
        f"{top[0]:,}, {top[1]:,}, {top[2]:,} at most; {pairs} pairs a GPU and step",
        soft_wrap=True,
    )
    long = cost.attention * places(*lengths.T).sum() / cost.of(lengths).sum()
    console.print(
        f"a pair takes {1e3 * cost.token:.3g} ms a token and {1e9 * cost.attention:.3g} ns a place of attention, which is "
        f"{long:.0%} of the whole; a micro-batch {1e3 * cost.micro_batch:.3g} ms",
        soft_wrap=True,
    )
    if facts:
        console.print(f"measured on {facts['device']}, fitted to within {facts['largest_error_of_the_fit']:.1%}")
    table = Table("GPUs", "steps", "waiting, dealt by work", "by tokens alone", "plain sampler", box=None)
    for column in table.columns:
        column.justify = "right"
    for row in rows:
        steps = f"{row.steps}{' (pairs repeated)' if row.repeated else ''}"
        table.add_row(f"{row.gpus:,}", steps, f"{row.dealt:.2%}", f"{row.by_tokens:.1%}", f"{row.plain:.0%}")
    console.print(table)


if __name__ == "__main__":
    run_command(command)
