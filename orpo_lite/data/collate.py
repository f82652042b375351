"""Tokenized pairs -> one batch. Every layout gives the loss the same: which rows carry which label for which pair."""

import itertools
import os
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from orpo_lite.data.lengths import answer_tokens

Row = dict[str, Any]
ROW_FIELDS = ("chosen_ids", "rejected_ids", "chosen_start", "rejected_start", "chosen_context", "rejected_context",
              "row")  # fmt: skip
Label = tuple[int, ...]
"""The fields of LABEL_FIELDS, see `PaddedCollator`."""
LABEL_FIELDS = ("label_rows", "label_ids", "chosen_pair", "rejected_pair", "nll_pair")
Segment = tuple[int, int, int, int]
"""Where a pair lies in the packed row, in tokens: start, common prefix, rest of chosen, rest of rejected.

A plain tuple: accelerate rebuilds tuples from an iterator when it moves batches to a device, which a NamedTuple does not
allow."""


@dataclass
class PaddedCollator:
    """Pairs as 2B right-padded sequences, all chosen first: TRL's layout, and the reference for the others.

    Args:
        pad_token_id: fills the end of short sequences; never a label, since labels come from lengths.
        nll_scope: prompt+chosen or chosen.

    A batch of B pairs holds:
        input_ids, attention_mask: (2B, L) int64.
        label_rows: (N,) flat index of the hidden state that predicts each label.
        label_ids: (N,) the labels.
        chosen_pair, rejected_pair, nll_pair: (N,) the pair (0 to B-1) for whose chosen completion, rejected
            completion or NLL the label counts, else -1.
        pair_rows: (B,) index of each pair in its source; -1 where it is not known.
        made_of: the pairs themselves, for `select_pairs`.
    """

    pad_token_id: int
    nll_scope: str = "prompt+chosen"

    def __call__(self, pairs: list[Row]) -> dict[str, Any]:
        sequences = [p["chosen_ids"] for p in pairs] + [p["rejected_ids"] for p in pairs]
        answers = [answer_tokens(p, side, first=1) for side in ("chosen", "rejected") for p in pairs]
        width = max(map(len, sequences))
        padded = torch.full((len(sequences), width), self.pad_token_id)
        mask = torch.zeros_like(padded)
        labels: list[Label] = []
        for i, (ids, answer) in enumerate(zip(sequences, answers, strict=True)):
            padded[i, : len(ids)] = torch.as_tensor(ids)
            mask[i, : len(ids)] = 1
            pair, chosen = i % len(pairs), i < len(pairs)
            everything = chosen and self.nll_scope == "prompt+chosen"
            # a row predicts the token after it, so the first token of a sequence is never a label
            for t in range(1, len(ids)) if everything else answer:
                counted = pair if t in answer else -1
                sides = (counted, -1, pair) if chosen else (-1, counted, -1)
                labels.append((i * width + t - 1, ids[t], *sides))
        return {"input_ids": padded, "attention_mask": mask} | about_pairs(labels, pairs, self)


@dataclass
class PackedCollator:
    """Pairs end to end in one row without padding, each as `[common prefix | rest of chosen | rest of rejected]`.

    The prefix is the longest common token prefix of the two sequences, so completions that begin alike share that as well.
    With `share` off both sequences are whole, and each attends only to itself.

    Args:
        nll_scope: prompt+chosen or chosen.
        share: compute the prefix once for both sequences.

    A batch holds what PaddedCollator's does, and
        input_ids, position_ids: (1, T); positions restart at each pair, and the rejected branch continues from the prefix.
        attention_mask: (1, T), 2 where a token stands for both sequences, so that a router's auxiliary loss, which
            is weighted by it, equals that of the padded layout.
        segments: a `Segment` for each pair.
        key_rows, query_starts, key_starts: see `call_rows`.
    """

    nll_scope: str = "prompt+chosen"
    share: bool = True

    def __call__(self, pairs: list[Row]) -> dict[str, Any]:
        ids: list[int] = []
        positions: list[int] = []
        weights: list[int] = []
        segments: list[Segment] = []
        labels: list[Label] = []
        for pair, row in enumerate(pairs):
            chosen, rejected = list(row["chosen_ids"]), list(row["rejected_ids"])
            prefix = len(os.path.commonprefix([chosen, rejected])) if self.share else 0
            self._label(labels, pair, row, len(ids), prefix)
            segments.append((len(ids), prefix, len(chosen) - prefix, len(rejected) - prefix))
            ids += chosen + rejected[prefix:]
            positions += [*range(len(chosen)), *range(prefix, len(rejected))]
            weights += [2] * prefix + [1] * (len(chosen) + len(rejected) - 2 * prefix)
        tensors = {"input_ids": ids, "position_ids": positions, "attention_mask": weights}
        batch: dict[str, Any] = {name: torch.tensor([values]) for name, values in tensors.items()}
        return batch | about_pairs(labels, pairs, self) | {"segments": segments} | call_rows(segments)

    def _label(self, labels: list[Label], pair: int, row: Row, start: int, prefix: int) -> None:
        chosen, rejected = row["chosen_ids"], row["rejected_ids"]
        answers = {side: answer_tokens(row, side, first=1) for side in ("chosen", "rejected")}
        everything = self.nll_scope == "prompt+chosen"
        # a label inside the prefix belongs to both sequences, and either may be the only one to count it
        for t in range(1, len(chosen)):
            for_chosen = pair if t in answers["chosen"] else -1
            for_rejected = pair if t < prefix and t in answers["rejected"] else -1
            in_nll = pair if everything or for_chosen == pair else -1
            if (for_chosen, for_rejected, in_nll) != (-1, -1, -1):
                labels.append((start + t - 1, chosen[t], for_chosen, for_rejected, in_nll))
        for t in answers["rejected"]:
            if t >= prefix:
                before = t - 1 if t == prefix else len(chosen) + t - 1 - prefix
                labels.append((start + before, rejected[t], -1, pair, -1))


def collator_of(layout: str, nll_scope: str = "prompt+chosen", pad: int = 0) -> PaddedCollator | PackedCollator:
    """Make the collator of a layout."""
    return PaddedCollator(pad, nll_scope) if layout == "padded" else PackedCollator(nll_scope, layout == "shared")


def call_rows(segments: list[Segment]) -> dict[str, Tensor]:
    """Return where one attention call over all pairs finds its sequences, two a pair, the empty ones left out.

    Returns:
        key_rows: rows of keys and values, sequence after sequence, prefix and chosen, then prefix and rejected; int64.
        query_starts, key_starts: where each sequence's queries and keys begin, and where the last ones end; int32.
    """
    rows: list[Tensor] = []
    queries, keys = [0], [0]
    for start, prefix, chosen, rejected in segments:
        middle = start + prefix + chosen
        own, shared, branch = (torch.arange(*ends) for ends in ((start, middle), (start, start + prefix), (middle, middle + rejected)))  # fmt: skip
        for count, parts in ((prefix + chosen, [own]), (rejected, [shared, branch])):
            if count:
                rows += parts
                queries.append(queries[-1] + count)
                keys.append(keys[-1] + sum(map(len, parts)))
    starts = {"query_starts": queries, "key_starts": keys}
    key_rows = torch.cat([torch.arange(0), *rows])
    return {"key_rows": key_rows} | {name: torch.tensor(at, dtype=torch.int32) for name, at in starts.items()}


def about_pairs(labels: list[Label], pairs: list[Row], collator: PaddedCollator | PackedCollator) -> dict[str, Any]:
    """Return what a batch of any layout holds: the fields of its labels as tensors, its pairs and their rows."""
    columns = torch.tensor(labels, dtype=torch.int64).reshape(-1, len(LABEL_FIELDS))
    fields: dict[str, Any] = {name: columns[:, i].contiguous() for i, name in enumerate(LABEL_FIELDS)}
    rows = torch.tensor([pair.get("row", -1) for pair in pairs], dtype=torch.int64)
    kept = [{name: pair[name] for name in ROW_FIELDS if name in pair} for pair in pairs]
    return fields | {"pair_rows": rows, "made_of": MadeOf(kept, collator)}


def from_trl(batch: dict[str, Any], collator: PaddedCollator | PackedCollator) -> dict[str, Any]:
    """Convert a batch of TRL's DPO collator, or of a user's own of that form, to one of `collator`."""
    pairs: list[Row] = []
    for i in range(len(batch["chosen_labels"])):
        pair: Row = {}
        for side in ("chosen", "rejected"):
            labels = batch[f"{side}_labels"][i]
            kept = batch[f"{side}_attention_mask"][i].bool()
            pair[f"{side}_ids"] = batch[f"{side}_input_ids"][i][kept].tolist()
            unlabeled = (labels[kept] == -100).tolist()
            start = pair[f"{side}_start"] = [*unlabeled, False].index(False)
            runs = itertools.groupby(range(start, len(unlabeled)), unlabeled.__getitem__)
            context = [list(run) for skipped, run in runs if skipped]
            pair[f"{side}_context"] = [place for run in context for place in (run[0], run[-1] + 1)]
        pairs.append(pair)
    return collator(pairs)


@dataclass
class MadeOf:
    """The pairs of a batch and its collator, so that parts of it can be made; nothing here is moved to a device."""

    pairs: list[Row]
    collator: PaddedCollator | PackedCollator


def pair_tokens(batch: dict[str, Any]) -> list[int]:
    """Return the tokens that each pair of a batch costs, as `lengths.pair_costs` counts them."""
    if "segments" in batch:
        return [prefix + chosen + rejected for _, prefix, chosen, rejected in batch["segments"]]
    return (2 * batch["attention_mask"].sum(1).view(2, -1).amax(0)).tolist()


def select_pairs(batch: dict[str, Any], pairs: list[int]) -> dict[str, Any]:
    """Return the batch that the collator makes of these pairs, by their indexes in the batch, on the batch's device."""
    made_of: MadeOf = batch["made_of"]
    part, device = made_of.collator([made_of.pairs[i] for i in pairs]), batch["pair_rows"].device
    return {name: value.to(device) if isinstance(value, Tensor) else value for name, value in part.items()}
