"""Report of a step whose loss or gradients are not finite: which numbers, through which pairs, and what to try."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from orpo_lite.common.errors import RequestError
from orpo_lite.data.collate import pair_tokens, select_pairs
from orpo_lite.data.sources import open_source

if TYPE_CHECKING:
    from orpo_lite.recipe import DataSection

IN_A_ROW, IN_ALL = 5, 20
"""Steps that on_nonfinite=skip leaves out before it gives up: one after another, and in a whole run."""
SHOWN = 4
"""Number of rows and tensors that a message lists."""
LARGE_WEIGHT = 1e3
"""Size of a trained weight beyond which a step has thrown the adapter out."""


class NonFinite(FloatingPointError):
    """A loss or gradient that is NaN or infinite, found before the optimizer step."""


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a tensor that may be sharded."""
    if isinstance(tensor, DTensor):
        return tensor.to_local()
    return getattr(tensor, "ds_tensor", tensor)  # ZeRO-3 leaves an empty tensor in the parameter's place


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return trained parameters by name."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def largest(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return the largest absolute value over tensors, a float32 scalar on `device`; NaN or inf where one holds such a value.

    It is the norm of order inf, since that of order 2 overflows where all values are finite.
    """
    if not tensors:
        return torch.zeros((), device=device)
    return torch.nn.utils.get_total_norm([local(one) for one in tensors], math.inf).to(device, torch.float32)


def not_finite(tensor: Tensor) -> int:
    return int((~torch.isfinite(local(tensor))).sum())


@dataclass
class Finding:
    """A step whose numbers are not finite."""

    step: int
    """Optimizer step, from 1."""
    losses: list[float]
    """Each pass's share of the step's loss, in the order of the passes; all processes."""
    gradients: dict[str, list[int]] = field(default_factory=dict)
    """Parameter -> how many values of its gradient are not finite, of how many; of shards, this process's."""
    weights: dict[str, list[int]] = field(default_factory=dict)
    """Trained parameters that are not finite themselves, the same."""
    largest_weight: float = 0.0
    """Largest absolute value of a trained parameter."""
    pairs: list[dict[str, Any]] = field(default_factory=list)
    """The step's pairs: pass, row, source, number (in the tokenized pairs), tokens; and, where they were computed one by
    one, their own `loss` and how many values of their `gradients` are not finite."""
    alone: bool = False
    """Whether the pairs were computed one by one."""
    learning_rate: float = 0.0
    precision: str = ""

    @property
    def culprits(self) -> list[dict[str, Any]]:
        return [p for p in self.pairs if not math.isfinite(p.get("loss", 0.0)) or p.get("gradients")]

    def words(self) -> str:
        """Say what was found, by number, row and tensor."""
        loss = sum(self.losses)
        lines = [f"step {self.step}: " + (
            f"the loss is {loss:g}" if not math.isfinite(loss) else f"the loss is {loss:.4g}, but gradients are not finite"
        ) + ". It was found before the optimizer step, which was not taken"]  # fmt: skip
        if len(self.losses) > 1 and not math.isfinite(loss):
            wrong = [str(i + 1) for i, one in enumerate(self.losses) if not math.isfinite(one)]
            lines.append(f"micro-batches: {', '.join(wrong[:SHOWN])} of {len(self.losses)} not finite")
        for what, found in (("gradients", self.gradients), ("trained weights", self.weights)):
            if found:
                values, whole = (sum(counts[i] for counts in found.values()) for i in (0, 1))
                first = ", ".join(f"{plain(name)} ({n:,} of {of:,})" for name, (n, of) in list(found.items())[:SHOWN])
                more = f" and {len(found) - SHOWN} more" if len(found) > SHOWN else ""
                lines.append(
                    f"{what}: {values:,} of {whole:,} values not finite in {len(found)} tensors: {first}{more}"
                )
        culprits = self.culprits
        all_of_them = len(culprits) == len(self.pairs)
        lines.append(f"pairs of the step{', each not finite when computed alone' * all_of_them}: {listed(self.pairs)}")
        if culprits and not all_of_them:
            lines.append(f"not finite when computed alone: {listed(culprits)}")
        elif self.alone and not culprits:
            lines.append("each pair computed alone is finite: no single one is to blame, or it does not happen twice")
        return "\n  ".join(lines)

    def advice(self) -> str:
        """Say what to try, by what was found."""
        slower = f"a lower training.learning_rate (it was {self.learning_rate:.3g} here) and more training.warmup_steps"
        if self.weights or self.largest_weight > LARGE_WEIGHT:
            grown = "no longer numbers" if self.weights else f"as large as {self.largest_weight:.3g}"
            return f"the trained weights are {grown}, thrown there by the steps before: try {slower}"
        precise = "" if self.precision == "float32" else "model.dtype=float32 (or bfloat16, where it was float16), "
        if self.culprits and len(self.culprits) < len(self.pairs):
            return f"look at the rows named; without them training may work as it is. Otherwise try {precise}{slower}"
        return f"try {precise}{slower}; if the very first step fails, look at the base model's weights"


def plain(name: str) -> str:
    """Strip what PEFT puts around a parameter's name."""
    return name.removeprefix("base_model.model.").replace(".default.", ".")


def listed(pairs: list[dict[str, Any]]) -> str:
    """List pairs by row, source and tokens."""
    words = []
    for pair in pairs[:SHOWN]:
        place = f"row {pair['row']}" if pair["row"] >= 0 else "an unknown row"
        if pair["source"]:
            place += f" of {pair['source']}"
        if pair["number"] is not None:
            place += f" (number {pair['number']} of the tokenized pairs, {pair['tokens']:,} tokens)"
        if "loss" in pair and not math.isfinite(pair["loss"]):
            place += f": loss {pair['loss']:g}"
        elif pair.get("gradients"):
            place += f": {pair['gradients']:,} values of the gradient"
        words.append(place)
    return "; ".join(words) + (f"; and {len(pairs) - SHOWN} more" if len(pairs) > SHOWN else "")


def locate_pairs(batch: dict[str, Any], dataset: Any, sources: list[str], numbers: dict[int, list[int]]) -> list[dict]:
    """Find where a batch's pairs come from; `numbers`, filled here, maps a row to its places in the tokenized pairs."""
    columns = getattr(dataset, "column_names", None) or []
    if not numbers and "row" in columns:
        for number, row in enumerate(np.asarray(dataset.with_format(None)["row"]).tolist()):
            numbers.setdefault(row, []).append(number)
    places = []
    for i, (row, tokens) in enumerate(zip(batch["pair_rows"].tolist(), pair_tokens(batch), strict=False)):
        # sources and their weights repeat row numbers: the tokens tell which it was
        same = [n for n in numbers.get(row, []) if len(numbers[row]) == 1 or is_pair(batch, i, dataset[n])]
        source = None
        if same and "source" in columns and dataset[same[0]]["source"] < len(sources):
            source = sources[dataset[same[0]]["source"]]
        places.append({"row": row, "source": source, "number": same[0] if same else None, "tokens": tokens})
    return places


def is_pair(batch: dict[str, Any], place: int, row: dict[str, Any]) -> bool:
    """Tell whether the batch's pair at a place is this tokenized one."""
    ids = list(row["prompt_ids"] if "prompt_ids" in row else row["chosen_ids"])
    if "segments" in batch:
        start, prefix, chosen, _ = batch["segments"][place]
        return batch["input_ids"][0, start : start + prefix + chosen].tolist() == ids
    return batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist() == ids


@contextmanager
def preserved_rng(device: torch.device) -> Iterator[None]:
    """Restore the random state at the end."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        yield


def one_by_one(trainer: Any, batch: dict[str, Any], with_gradients: bool) -> list[dict[str, Any]]:
    """Compute each pair of a batch alone: its loss and, where asked, how many values of its gradient are not finite.

    torch.autograd.grad leaves .grad and the hooks of distributed training alone.
    """
    parameters = list(trained(trainer.model).values())
    found = []
    for i in range(len(batch["pair_rows"])):
        part = select_pairs(batch, [i])
        with torch.set_grad_enabled(with_gradients), trainer.compute_loss_context_manager():
            loss, _ = trainer.objective.loss(trainer.model, [part])
        mine = {"loss": float(loss)}
        if with_gradients and loss.requires_grad:
            grads = torch.autograd.grad(loss, parameters, allow_unused=True)
            mine["gradients"] = sum(not_finite(grad) for grad in grads if grad is not None)
        found.append(mine)
    return found


# ---- the rows of the step, as a file to train on -----------------------------------------------------------------------


def rows_as_given(pairs: list[dict[str, Any]], data: DataSection | None, given: Any) -> list[dict[str, Any]]:
    """Return the rows of some pairs as they were before tokenization; none where one of them cannot be read again.

    Args:
        pairs: as `locate_pairs` finds them.
        data: the section of the recipe that they come from.
        given: the data set that a script gave the trainer, if no recipe did.
    """
    wanted = sorted({(str(pair["source"] or ""), pair["row"]) for pair in pairs})
    try:
        if data is None:
            rows = [given[row] for _, row in wanted if row >= 0] if isinstance(given, Dataset) else []
        else:
            rows = [read_row(data, source, row) for source, row in wanted if row >= 0]
    except (RequestError, OSError, IndexError, StopIteration):
        return []
    return rows if len(rows) == len(wanted) and all(isinstance(row, dict) for row in rows) else []


def read_row(data: DataSection, path: str, row: int) -> Any:
    """Read one row of a source of data.train again; StopIteration where there is none."""
    source = next(one for one in data.train if one.path == path or (not path and len(data.train) == 1))
    batches = open_source(source, data.split, data.columns, field="data.train").batches()
    return next(itertools.islice(itertools.chain.from_iterable(batches), row, None))


def decoded_rows(batch: dict[str, Any], tokenizer: Any) -> list[dict[str, str]]:
    """Decode the pairs of a batch: prompt, chosen and rejected as the text that was tokenized, template included."""
    found = []
    for place in range(len(batch["pair_rows"])):
        sides = [batch["label_ids"][batch[name] == place].tolist() for name in ("chosen_pair", "rejected_pair")]
        if "segments" in batch:
            start, prefix, chosen, _ = batch["segments"][place]
            line = batch["input_ids"][0, start : start + prefix + chosen].tolist()
        else:
            line = batch["input_ids"][place][batch["attention_mask"][place].bool()].tolist()
        prompt = line if "decoder_input_ids" in batch else line[: len(line) - len(sides[0])]
        texts = [tokenizer.decode(ids) for ids in (prompt, *sides)]
        found.append(dict(zip(("prompt", "chosen", "rejected"), texts, strict=True)))
    return found
