"""The plan of a merge, settled and checked from file headers before anything is written."""

import copy
from dataclasses import dataclass, field
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from transformers import PreTrainedTokenizerBase

from orpo_lite.common.console import progress
from orpo_lite.common.errors import RequestError
from orpo_lite.merge.base import Base
from orpo_lite.merge.lora_edits import NAME, Added, Dora, Edit, LowRank, Replaced, Rows, read_adapter
from orpo_lite.merge.safetensors_blocks import DTYPES, Source, Stored, resized
from orpo_lite.merge.weight_map import Link
from orpo_lite.merge.write import Job
from orpo_lite.model.adapter import lora_config, vocabulary_rows
from orpo_lite.trainer.run_folder import check_tokens_have_rows, tokens_from


@dataclass
class Plan:
    """A merge that can be done.

    Attributes:
        adapters: folder of each adapter with its weight.
        adapted: the base's skeleton with the adapters on it.
        edits: the adapters' changes by parameter name.
        dtype: dtype of most of the merged weights.
        shards: file name -> tensors to write, in order.
        untied: parameters that are one tensor in the base and two in the merged model.
        new_tokens: ids of the tokens that the adapter adds or trains.
        rowless: tokens that have no embedding in the base either, by name.
    """

    base: Base
    adapters: list[tuple[Path, float]]
    adapted: PeftModel
    edits: dict[str, list[Edit]]
    dtype: torch.dtype
    shards: dict[str, list[Job]] = field(default_factory=dict)
    untied: list[str] = field(default_factory=list)
    new_tokens: list[int] = field(default_factory=list)
    rowless: dict[str, int] = field(default_factory=dict)

    @property
    def jobs(self) -> list[Job]:
        return [job for jobs in self.shards.values() for job in jobs]

    @property
    def nbytes(self) -> int:
        return sum(job.nbytes for job in self.jobs)


@progress("reading base and adapter")
def make_plan(
    adapters: list[tuple[Path, float]], base: Base, tokenizer: PreTrainedTokenizerBase, dtype: torch.dtype | None = None
) -> Plan:
    """Settle every tensor of the merged model.

    Args:
        base: what to merge into; its vocabulary becomes the adapter's, and its skeleton gets the adapters.
        tokenizer: as trained with; its new tokens get rows.
        dtype: dtype of the merged weights; default: as each is stored.

    Raises:
        RequestError: base and adapters do not fit, a token has no embedding, or the base's checkpoint cannot express a
            change.
    """
    model, source = base.model, adapters[0][0]
    held = len(model.get_input_embeddings().weight)  # type: ignore[arg-type]
    rows = max(vocabulary_rows(model, folder, lora_config(str(folder)), tokenizer) for folder, _ in adapters)
    resize(base, rows)
    rowless = check_tokens_have_rows(tokenizer, rows, source, base.spec)
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    exact = [*(model._keep_in_fp32_modules or ()), *(model._keep_in_fp32_modules_strict or ())]
    adapted, edits = read_adapters(adapters, base)
    trained = {int(i) for own in edits.values() for edit in own if isinstance(edit, Rows) for i in edit.index}
    new_tokens = sorted(trained | set(tokens_from(tokenizer, held).values()) - set(rowless.values()))
    plan = Plan(base, adapters, adapted, edits, dtype or base.dtype, new_tokens=new_tokens, rowless=rowless)
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
    if base.spec.gguf_file:  # dequantized into a file for each weight
        plan.shards = {"model.safetensors": plan.jobs}
    check_all_applied(source, plan)
    return plan


def read_adapters(adapters: list[tuple[Path, float]], base: Base) -> tuple[PeftModel, dict[str, list[Edit]]]:
    """Put adapters on the base's skeleton; return it, with all of them active, and their changes by parameter name.

    Raises:
        RequestError: see `read_adapter`; or a change of which no multiple can be added.
    """
    skeletons = [base.model, *(copy.deepcopy(base.model) for _ in adapters[1:])]
    found = [read_adapter(folder, skeleton) for (folder, _), skeleton in zip(adapters, skeletons, strict=True)]
    if len(adapters) == 1 and adapters[0][1] == 1:
        return found[0]
    edits: dict[str, list[Edit]] = {}
    for (model, own), (folder, weight) in zip(found, adapters, strict=True):
        for name, edit in ((name, edit) for name, changes in own.items() for edit in changes):
            if isinstance(edit, LowRank | Added) and not isinstance(edit, Dora):
                edit.scale *= weight
                edits.setdefault(name, []).append(edit)
            else:
                kind = {Dora: "DoRA", Rows: "trained rows"}.get(type(edit), "weights saved as a whole")
                raise RequestError(
                    f"--adapter: {folder} changes {name} by {kind}, which has no weighted sum: merge it alone, without a weight"
                )
        add_layers(found[0][0], model, weight)
    return found[0][0], edits


def add_layers(adapted: PeftModel, other: PeftModel, weight: float) -> None:
    """Add another skeleton's LoRA layers times a weight, for PEFT to run all together; `other` may be `adapted`."""
    inside, moved = adapted.get_base_model(), "nothing"
    for path, layer in list(other.get_base_model().named_modules()):
        if not isinstance(layer, LoraLayer):
            continue
        layer.scaling[NAME] *= weight
        mine = inside.get_submodule(path) if not path.startswith(f"{moved}.") else layer
        if isinstance(mine, LoraLayer) and mine is not layer:
            key = str(len(mine.active_adapters))
            for part in (*layer.adapter_layer_names, *layer.other_param_names):
                if NAME in getattr(layer, part):
                    getattr(mine, part)[key] = getattr(layer, part)[NAME]
            mine._active_adapter = [*mine.active_adapters, key]
        elif mine is not layer:
            inside.set_submodule(path, layer)  # type: ignore[arg-type]  # a module too
            moved = path


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
