"""`python -m orpo_lite.bench --recipe NAME [--against trl]`: our trainer and TRL's on the same pairs, in one run."""

from __future__ import annotations

import contextlib
import json
import statistics
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import torch
import typer
from datasets import Dataset, disable_progress_bars, enable_progress_bars

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError
from orpo_lite.objective.packed_attention import plain_attention
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION
from orpo_lite.train.meters import interleaved, peak_over, ratios
from orpo_lite.trainer.config import CHECKPOINTING, RENAMED
from orpo_lite.trainer.model_setup import base_of, disable_dropout

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer


@contextlib.contextmanager
def random_model(recipe: Recipe, layers: int) -> Iterator[Recipe]:
    """The recipe with a random model of its base's shape and `layers` layers: a benchmark that needs no weights."""
    from transformers import AutoModelForCausalLM

    from orpo_lite.model import load_tokenizer
    from orpo_lite.model.base import read_config
    from orpo_lite.plan.configs import base_config

    tokenizer = load_tokenizer(recipe.model)
    config: Any = base_config(recipe.model.name_or_path) or read_config(recipe.model)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    torch.manual_seed(0)
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        section = recipe.model.model_copy(update={"name_or_path": folder, "gguf_file": None, "revision": None})
        yield recipe.model_copy(update={"model": section})


class Contest:
    """The recipe's model with its adapter, the pairs, and the trainers that compute the same steps on them."""

    def __init__(self, recipe: Recipe, pairs: int, against: list[str], checkpointing: bool):
        from orpo_lite.data import load_pairs
        from orpo_lite.model import attach_adapter, load_base, load_tokenizer
        from orpo_lite.trainer.config_from_recipe import arguments
        from orpo_lite.trainer.trainer import ORPOTrainer

        data = recipe.data.model_copy(update={"eval": None, "eval_fraction": 0.0})
        tokenizer = load_tokenizer(recipe.model)
        found = load_pairs(data, tokenizer).train
        order = torch.randperm(len(found), generator=torch.Generator().manual_seed(data.seed)).tolist()
        self.rows: list[dict[str, Any]] = [found[i] for i in order[:pairs]]
        base, self.facts = load_base(recipe.model, tokenizer)
        self.model: Any = attach_adapter(base, recipe.adapter, tokenizer=tokenizer, checkpointing=checkpointing)
        for name, parameter in self.model.named_parameters():
            if "lora_B" in name:  # an untrained adapter's B is zero, and A would get no gradient
                torch.nn.init.normal_(parameter, std=0.02)
        disable_dropout(self.model)
        if checkpointing:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.trainers: dict[str, Any] = {}
        with tempfile.TemporaryDirectory() as scratch:
            layouts = [name for name in against if name != "trl"]
            for layout in [recipe.orpo.layout, *layouts]:
                args = arguments(recipe, Path(scratch), self.facts, has_eval=False, checkpointing=0)
                args.layout = layout
                trainer = ORPOTrainer(self.model, args, None, found.select([0]), None, tokenizer)
                self.trainers["ours" if not self.trainers else layout] = trainer
            if "trl" in against:
                self.trainers["trl"] = trl_trainer(self.model, args, tokenizer, scratch)
        ours: ORPOTrainer = self.trainers["ours"]
        self.setting = {
            "model": f"{self.facts.name}, {sum(p.numel() for p in self.model.parameters()):,} stored weights",
            "quantization": self.facts.quantization,
            "precision": self.facts.precision.why,
            "attention": self.facts.attention,
            "checkpointing": "all layers" if checkpointing else "off",
            "max_length": data.max_length,
            "layout": f"{ours.layout.name}: {ours.layout.why}",
            "device": torch.cuda.get_device_name() if torch.cuda.is_available() else f"cpu, {torch.get_num_threads()} threads",
            "pairs": len(self.rows),
            "tokens_per_pair": sum(len(r["chosen_ids"]) + len(r["rejected_ids"]) for r in self.rows) / len(self.rows),
        }  # fmt: skip

    def steps(self, name: str, batch_size: int) -> Callable[[], float]:
        """Forward and backward over all pairs, in batches, and one optimizer step: work to be timed."""
        trainer: Any = self.trainers[name]
        shape = trl_row if name == "trl" else dict
        rows = [shape(row) for row in self.rows]
        trainer.optimizer = None
        optimizer = trainer.create_optimizer()
        for group in optimizer.param_groups:
            group["lr"] = 0.0  # the same work, and every contestant goes on with the same weights

        def work() -> float:
            if name == "trl":
                plain_attention(base_of(self.model))
            loss = 0.0
            for start in range(0, len(rows), batch_size):
                batch = trainer.data_collator(rows[start : start + batch_size])
                trainer.current_gradient_accumulation_steps = 1
                loss += trainer.training_step(self.model, batch).item()
            optimizer.step()
            self.model.zero_grad()
            return loss / -(-len(rows) // batch_size)

        return work

    def check(self, batch_size: int) -> dict[str, float]:
        """Every contestant's mean loss; they must agree before their times mean anything."""
        losses = {name: self.steps(name, batch_size)() for name in self.trainers}
        spread = max(losses.values()) - min(losses.values())
        allowed = 1e-4 if self.facts.precision.dtype is torch.float32 else 5e-2
        if not spread <= allowed:
            raise RuntimeError(f"the losses differ by {spread:.2g}, so the times cannot be compared: {losses}")
        return losses

    def race(self, batch_size: int, repeats: int) -> dict[str, Any]:
        """Times, throughput, memory and their ratios at one batch size."""
        losses = self.check(batch_size)
        seconds = interleaved({name: self.steps(name, batch_size) for name in self.trainers}, repeats)
        peaks = {name: self.peak(name, batch_size) for name in self.trainers}
        tokens = sum(len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows)
        result: dict[str, Any] = {"batch_size": batch_size, "contestants": {}}
        for name in self.trainers:
            median = statistics.median(seconds[name])
            result["contestants"][name] = {
                "loss": losses[name], "seconds": seconds[name], "pairs_per_second": len(self.rows) / median,
                "tokens_per_second": tokens / median, "peak_bytes_over_weights": peaks[name],
            }  # fmt: skip
            if name != "ours":
                result["contestants"][name]["ours_is_times_as_fast"] = ratios(seconds[name], seconds["ours"])
                result["contestants"][name]["ours_memory_share"] = peaks["ours"] / peaks[name]
        return result

    def peak(self, name: str, batch_size: int) -> int:
        """Bytes over the weights that the largest batch takes, gradients and optimizer states aside from both."""
        size = [len(row["chosen_ids"]) + len(row["rejected_ids"]) for row in self.rows]
        largest = max(range(0, len(size), batch_size), key=lambda start: sum(size[start : start + batch_size]))
        rows, self.rows = self.rows, self.rows[largest : largest + batch_size]
        try:
            return peak_over(self.steps(name, batch_size), self.model.device)
        finally:
            self.rows = rows


def trl_trainer(model: Any, args: Any, tokenizer: Any, scratch: str, **settings: Any) -> Any:
    """TRL's ORPOTrainer around the same model, with the same precision, and further settings of its ORPOConfig."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.orpo import ORPOConfig as TRLConfig
        from trl.experimental.orpo import ORPOTrainer as TRLTrainer
    checkpointing: dict[str, Any] = {
        CHECKPOINTING if RENAMED else "gradient_checkpointing": False
    }  # the model has it on already
    config = TRLConfig(output_dir=scratch, beta=args.beta, max_length=args.max_length, report_to="none", disable_dropout=True,
                       remove_unused_columns=False,
                       bf16=args.bf16, fp16=args.fp16, optim=args.optim, learning_rate=args.learning_rate,
                       dataloader_pin_memory=torch.cuda.is_available(), **checkpointing, **settings)  # fmt: skip
    row = Dataset.from_list([{"prompt": "a", "chosen": "b", "rejected": "c"}])
    disable_progress_bars()  # of one row being tokenised
    try:
        return TRLTrainer(model, config, train_dataset=row, processing_class=tokenizer)
    finally:
        enable_progress_bars()


def trl_row(row: dict[str, Any]) -> dict[str, Any]:
    """A tokenised pair in the form that TRL's collator takes."""
    made: dict[str, Any] = {}
    for side in ("chosen", "rejected"):
        ids, start = list(row[f"{side}_ids"]), row[f"{side}_start"]
        made |= {f"{side}_input_ids": ids, f"{side}_attention_mask": [1] * len(ids)}
        made[f"{side}_labels"] = [-100] * start + ids[start:]
    prompt = list(row["chosen_ids"][: row["chosen_start"]])
    return made | {"prompt_input_ids": prompt, "prompt_attention_mask": [1] * len(prompt)}


def show(setting: dict[str, Any], races: list[dict[str, Any]]) -> None:
    from rich.table import Table

    for key, value in setting.items():
        console.print(f"[bold]{key:<16}[/] {value:,.1f}" if isinstance(value, float) else f"[bold]{key:<16}[/] {value}")
    table = Table(
        "batch", "contestant", "pairs/s", "tokens/s", "MB over weights", "ours: times as fast", "memory", box=None
    )
    for race in races:
        for name, c in race["contestants"].items():
            ratio = c.get("ours_is_times_as_fast")
            table.add_row(str(race["batch_size"]), name, f"{c['pairs_per_second']:.2f}", f"{c['tokens_per_second']:,.0f}",
                          f"{c['peak_bytes_over_weights'] / 1e6:,.0f}",
                          f"{ratio['median']:.2f} ({ratio['min']:.2f} to {ratio['max']:.2f})" if ratio else "",
                          f"{c['ours_memory_share']:.2f}" if ratio else "")  # fmt: skip
    console.print(table)


def show_heads(title: str, contestants: dict[str, Any]) -> None:
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
    recipe: Annotated[str, RECIPE_OPTION],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value, for example data.train=my.jsonl")] = None,
    against: Annotated[str, typer.Option(help="trl, and layouts of ours: trl,padded")] = "trl",
    batch: Annotated[str, typer.Option(help="batch sizes in pairs")] = "1,2,4,8",
    pairs: Annotated[int, typer.Option(help="pairs of each measurement")] = 16,
    repeats: Annotated[int, typer.Option(help="repeats of each measurement, the contestants in turn")] = 5,
    layers: Annotated[
        int | None, typer.Option(help="a random model of the base's shape with so many layers, instead of its weights")
    ] = None,
    checkpointing: Annotated[bool, typer.Option(help="recompute all layers in the backward pass")] = False,
    head: Annotated[bool, typer.Option(help="compare the output head alone as well")] = True,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of tables")] = False,
) -> None:
    """Time our trainer against TRL's on the recipe's own pairs, model and adapter."""
    from tests.benchmarks.head import race_heads, race_liger

    names = [name for name in against.split(",") if name]
    unknown = set(names) - {"trl", "padded", "packed", "shared"}
    if unknown:
        raise RequestError(f"--against: found {', '.join(sorted(unknown))}, expected trl, padded, packed or shared")
    sizes = [int(size) if size.strip().isdigit() else 0 for size in batch.split(",")]
    if not all(0 < size <= pairs for size in sizes):
        raise RequestError(f"--batch: found {batch!r}, expected numbers from 1 to {pairs} (--pairs), such as 1,2,4")
    chosen = Recipe.load(recipe, overrides or [])
    with random_model(chosen, layers) if layers else contextlib.nullcontext(chosen) as spec:
        contest = Contest(spec, pairs, names, checkpointing)
        heads = race_heads(base_of(contest.model), repeats) if head else None
        liger = race_liger(base_of(contest.model), contest.rows[:4], repeats) if head else None
        races = []
        for size in sizes:
            errors.print(f"measuring batches of {size}")
            races.append(contest.race(size, repeats))
    if as_json:
        print(json.dumps({"setting": contest.setting, "races": races, "head": heads, "liger": liger}, indent=1))
    else:
        show(contest.setting, races)
        if heads:
            show_heads(f"head alone, {heads['shape']}, chunk {heads['chunk']}", heads["contestants"])
            for name, why in heads["absent"].items():
                console.print(f"{name}: not compared, {why}")
        if isinstance(liger, str):
            console.print(f"liger: not compared, {liger}")
        elif liger:
            show_heads("head and loss, the first 4 pairs: ours shared, Liger's padded", liger)
