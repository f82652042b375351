"""The plan of a merge, settled and checked from file headers before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.lora_edits import Dora, Edit, Replaced, Rows, read_adapter
from orpo_lite.merge.safetensors_blocks import DTYPES, Source, Stored, resized
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.write import Job
from orpo_lite.model.adapter import lora_config, vocabulary_rows


@dataclass
class Plan:
    """A merge that can be done.

    Attributes:
        adapted: the base's skeleton with the adapter on it.
        edits: the adapter's changes by parameter name.
        dtype: dtype of most of the merged weights.
        shards: file name -> tensors to write, in order.
        untied: parameters that are one tensor in the base and two in the merged model.
    """

    base: Base
    adapted: PeftModel
    edits: dict[str, list[Edit]]
    dtype: torch.dtype
    shards: dict[str, list[Job]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)


def make_plan(source: Path, base: Base, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None) -> Plan:
    """Settle every tensor of the merged model.

    Args:
        source: adapter folder.
        base: what to merge into; its vocabulary becomes the adapter's, and its skeleton gets the adapter.
        tokenizer: as trained with; its new tokens get rows.
        dtype: dtype of the merged weights; default: as each is stored.

    Raises:
        RequestError: base and adapter do not fit, or the base's checkpoint cannot express a change.
    """
    model = base.model
    resize(base, vocabulary_rows(model, source, lora_config(str(source)), tokenizer))
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    exact = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    adapted, edits = read_adapter(source, model)
    plan = Plan(base, adapted, edits, dtype or base.dtype)
    routes = {key: (one, base.keys.links[key]) for key, one in base.sources.items()}
    for one, other in base.tied.items():
        if not alike(edits.get(one, []), edits.get(other, [])):
            plan.untied += untie(plan, routes, one, other)
    last = list(base.files.values())[-1]
    for key, (one, links) in routes.items():
        changes = tuple((link, edit) for link in links for edit in edits.get(link.parameter, []))
        for link, edit in changes:
            if isinstance(edit, Dora) and (len(links) > 1 or not link.covers(shapes[link.parameter])):
                raise RequestError(f"adapter: {source} has DoRA on {link.parameter}, of which {key} is only a part")
        keep = dtype is None or any(word in link.parameter for word in exact for link in links)
        job = Job(key, one, changes, written_dtype(one, bool(changes), None if keep else dtype))
        plan.shards.setdefault(base.files.get(key, last).name, []).append(job)
    check_all_applied(source, plan)
    return plan


def written_dtype(one: Source, changed: bool, asked: torch.dtype | None) -> torch.dtype | None:
    """Return the dtype asked for, else that of the weights; None for a tensor that is copied byte by byte."""
    if isinstance(one, Stored):
        if one.stored_dtype not in DTYPES or not one.dtype.is_floating_point:
            return None
        if not changed and asked in (None, one.dtype):
            return None
    return asked or one.dtype


def resize(base: Base, rows: int) -> None:
    """Give the base's vocabulary another number of rows."""
    model = base.model
    if rows == len(model.get_input_embeddings().weight):  # type: ignore[arg-type]
        return
    before = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    model.resize_token_embeddings(rows, mean_resizing=False)
    after = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    for key, links in base.keys.links.items():
        for link in links:
            if before[link.parameter] != after[link.parameter]:
                base.sources[key] = resized(base.sources[key], rows)
                base.keys.links[key] = [Link.whole(link.parameter, after[link.parameter])]


def alike(one: list[Edit], other: list[Edit]) -> bool:
    """Return True where two tied parameters stay one: neither is changed, or both by the same tensor."""
    return len(one) == len(other) and all(
        isinstance(a, Rows | Replaced) and type(a) is type(b) and a.value.data_ptr() == b.value.data_ptr()  # type: ignore[union-attr]
        for a, b in zip(one, other, strict=True)
    )


def untie(plan: Plan, routes: dict[str, tuple[Source, list[Link]]], one: str, other: str) -> list[str]:
    """Separate two parameters that share a tensor where the adapter changes one, or each in its own way."""
    base = plan.base
    config = base.model.config
    config.tie_word_embeddings = config.get_text_config().tie_word_embeddings = False
    homes = {link.parameter: key for key, (_, links) in routes.items() for link in links}
    held = routes[homes.get(other) or homes[one]][0]
    for name in (one, other):
        routes[homes.get(name) or base.keys.key_for(name)] = (held, [Link.whole(name, held.shape)])
    return [one, other]


def check_all_applied(source: Path, plan: Plan) -> None:
    """Raise RequestError unless every change of the adapter has found its weights."""
    applied = {link.parameter for job in plan.jobs for link, _ in job.changes}
    for pair in plan.base.tied.items():
        if applied & set(pair) and not set(pair) <= set(plan.untied):
            applied |= set(pair)
    lost = sorted(set(plan.edits) - applied)
    if lost:
        why = plan.base.keys.unclear.get(lost[0], f"{plan.base.spec.name_or_path} stores no such weight")
        raise RequestError(
            f"adapter: {source} changes {len(lost)} weight(s) that have no place, first {lost[0]}: {why}"
        )
