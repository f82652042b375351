"""Parts of a batch: some of its pairs, as their collator would have made a batch of them alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

LABEL_PAIRS = ("chosen_pair", "rejected_pair", "nll_pair")


def pair_tokens(batch: dict[str, Any]) -> list[int]:
    """Tokens that each pair of a batch costs, as `work.pair_costs` counts them."""
    if "segments" in batch:
        return [prefix + chosen + rejected for _, prefix, chosen, rejected in batch["segments"]]
    lengths = batch["attention_mask"].sum(1)
    if "decoder_input_ids" in batch:
        lengths = lengths + _decoder_lengths(batch)
    return (2 * lengths.view(2, -1).amax(0)).tolist()


def select_pairs(batch: dict[str, Any], pairs: list[int]) -> dict[str, Any]:
    """The batch that a collator makes of these pairs, in rising order, of another of its batches; tensor for tensor."""
    index = torch.tensor(pairs, device=batch["pair_rows"].device)
    part, moved = _packed(batch, pairs) if "segments" in batch else _padded(batch, index)
    kept = moved[batch["label_rows"]] >= 0
    part["label_rows"] = moved[batch["label_rows"]][kept]
    part["label_ids"] = batch["label_ids"][kept]
    # the last entry is where -1, which counts for no pair, leads to
    number = torch.full((len(batch["pair_rows"]) + 1,), -1, device=index.device)
    number[index] = torch.arange(len(pairs), device=index.device)
    for name in LABEL_PAIRS:
        part[name] = number[batch[name]][kept]
    return part | {"pair_rows": batch["pair_rows"][index]}


def _packed(batch: dict[str, Any], pairs: list[int]) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the pairs' segments, and where each token has gone (-1: left out)."""
    segments, tokens, start = [], [], 0
    for pair in pairs:
        first, *lengths = batch["segments"][pair]
        segments.append((start, *lengths))
        tokens.append(torch.arange(first, first + sum(lengths)))
        start += sum(lengths)
    index = torch.cat(tokens).to(batch["input_ids"].device)
    part: dict[str, Any] = {name: batch[name][:, index] for name in ("input_ids", "position_ids", "attention_mask")}
    return part | {"segments": segments}, _places(batch["input_ids"].shape[1], index)


def _padded(batch: dict[str, Any], pairs: Tensor) -> tuple[dict[str, Any], Tensor]:
    """Inputs of the pairs' rows without the padding that only others needed, and where each hidden state has gone."""
    rows = torch.cat([pairs, pairs + len(batch["input_ids"]) // 2])
    mask = batch["attention_mask"][rows]
    width = int(mask.sum(1).max())
    part = {"input_ids": batch["input_ids"][rows, :width], "attention_mask": mask[:, :width]}
    states = batch["input_ids"]
    if "decoder_input_ids" in batch:
        states, width = batch["decoder_input_ids"], int(_decoder_lengths(batch)[rows].max())
        part["decoder_input_ids"] = states[rows, :width]
    index = rows[:, None] * states.shape[1] + torch.arange(width, device=rows.device)
    return part, _places(states.numel(), index.flatten())


def _decoder_lengths(batch: dict[str, Any]) -> Tensor:
    """Tokens of each completion: all of them are labels."""
    rows, width = batch["decoder_input_ids"].shape
    return torch.bincount(batch["label_rows"] // width, minlength=rows)


def _places(count: int, kept: Tensor) -> Tensor:
    places = torch.full((count,), -1, device=kept.device)
    places[kept] = torch.arange(len(kept), device=kept.device)
    return places
