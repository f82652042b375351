"""`orpo-lite new DATA --model NAME`: look at the data and write a recipe for it, with the reason for each choice."""

from __future__ import annotations

import json
import math
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
import yaml

from orpo_lite.common.console import console, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import write_atomically
from orpo_lite.common.text import counted, next_command, visible
from orpo_lite.plan.gpus import Card, card_here, find_cards
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import apply_override, check_model_path
from orpo_lite.recipe.own_data import run_name

if TYPE_CHECKING:
    import numpy as np

    from orpo_lite.data import Pairs
    from orpo_lite.plan.before_training import Lengths

SAMPLE = 1000
"""Rows that are looked at as they are written; all of them are tokenized."""
REASONING = ("<think>", "</think>", "[THINK]", "reasoning_content", '"thinking"')
"""Marks of answers that hold reasoning."""
FEW_STEPS, MOST_EPOCHS = 100, 3
"""Optimizer steps below which a further epoch is taken, and the most epochs."""
HELD_OUT = (20, 500)
"""Held-out pairs: fewer tell little, more cost time at each evaluation."""
LARGE, TINY = 1e9, 1e8
"""Parameters from which on 4 bits and a paged optimizer save much, and up to which whole steps fit anywhere."""
RATES = ((6e9, "5e-5"), (3e8, "1e-4"), (1e7, "2e-4"), (0, "4e-3"))
"""Learning rates for LoRA by the model's least parameters, as in the shipped recipes."""
NAME = (
    "the run's name in its report and model card; its folder is outputs/<name>, or outputs/<name>-2 and so on where that holds "
    "another run"
)
GIVEN = "given on the command line"
OUTPUT = "output_dir: FOLDER  (a field that puts the run folder elsewhere)"
WIDTH = 110


class Draft:
    """A recipe in the making: what was chosen and why, and what the command line gave, which nothing replaces."""

    def __init__(self, data: str, model: str, overrides: list[str]) -> None:
        self.content: dict[str, Any] = {
            "name": run_name(data, model), "description": "", "needs": "", "model": {"name_or_path": model}, "adapter": {},
            "data": {"train": data}, "orpo": {}, "training": {}, "memory": {}, "evaluation": {},
        }  # fmt: skip
        self.words, given = overrides, [apply_override(self.content, word) for word in overrides]
        if self.content["adapter"] is None and isinstance(self.content["model"], dict):
            self.content["model"].setdefault("quantization", "none")  # 4-bit weights cannot be trained
        self.why = {"name": NAME} | {".".join(key.split(".")[:2]): GIVEN for key in given}
        """Reasons by `section.field`, or by the name of a field outside of the sections."""

    def choose(self, place: str, value: Any, why: str = "") -> None:
        """Set a section's field and say why, unless the command line gave it."""
        section, name = place.split(".")
        if section in self.why or self.why.get(place) == GIVEN:
            return
        self.content[section][name] = value
        self.why[place] = why

    def recipe(self, **data: Any) -> Recipe:
        """Return the recipe so far, with fields of its data section replaced.

        Raises:
            RecipeError: what was given does not fit.
        """
        return Recipe.parse(self.content | {"data": self.content["data"] | data}, "orpo-lite new", self.words)

    def text(self, head: str) -> str:
        """Write the recipe as YAML, with each reason as a comment above its field."""
        lines = [comment(head, ""), "\n"]
        for section, fields in self.content.items():
            if not isinstance(fields, dict):
                lines += [comment(self.why.get(section, ""), ""), field(section, fields)] * (fields != "")
            elif fields:
                lines.append(f"\n{section}:")
                for name, value in fields.items():
                    lines += [comment(self.why.get(f"{section}.{name}", ""), "  "), f"  {field(name, value)}"]
                lines.append(comment(OUTPUT, "  ") if section == "training" and "output_dir" not in fields else "")
        return "\n".join(line.removesuffix("\n") for line in lines if line) + "\n"


def comment(text: str, indent: str) -> str:
    """Return text as lines of comment; none for none."""
    lines = [part for line in text.splitlines() for part in textwrap.wrap(visible(line), WIDTH, break_on_hyphens=False)]
    return "\n".join(f"{indent}# {line}" for line in lines)


def field(name: str, value: Any) -> str:
    """Return a field as a line of YAML; a number given as text, such as 5e-5, as it stands."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False)
    return f"{name}: {value if name == 'learning_rate' else text.removesuffix('...' + chr(10)).strip()}"


# ---- the command -----------------------------------------------------------------------------------------------------


def command(
    data: Annotated[str, typer.Argument(help="file, glob, folder or hub id of preference pairs")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value that the recipe is to have, for example data.columns.prompt=question"),
    ] = None,
    model: Annotated[str, typer.Option(help="hub id or folder of the model to train")] = "",
    gpu: Annotated[
        str | None, typer.Option(help="the card to plan for, such as rtx-3060 or 12GB; default: this machine's, if any")
    ] = None,
    output: Annotated[Path | None, typer.Option(help="the recipe to write; default: MODEL-DATA.yaml, here")] = None,
) -> None:
    """Look at preference pairs and write a commented recipe that trains a model on them."""
    if not model:
        raise RequestError("found no --model: name the model to train, for example --model Qwen/Qwen2.5-0.5B-Instruct")
    draft = Draft(data, model, overrides or [])
    path = output_path(output or Path(f"{draft.content['name']}.yaml"))
    pairs = choose(draft, card_for(gpu))
    from orpo_lite.data.__main__ import print_report
    from orpo_lite.evaluate.held_out import too_few

    commands = "\n".join(f"  {next_command(name, '--recipe', path)}" for name in ("data", "train"))
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(
        path, draft.text(f"{data} for {model}, written by `orpo-lite new`. Look first, then train:\n{commands}")
    )
    print_report(pairs.report, pairs.shapes, pairs, [], list_drops=False, as_json=False, findings=[], fixed=None)
    if warning := too_few(len(pairs.eval) if pairs.eval else 0):
        console.print(f"[bold yellow]warning:[/] {warning}")
    needs = draft.content["needs"]
    console.print(f"\nplanned: {needs}" if needs else "\nno card was planned for: name one with --gpu", markup=False)
    console.print(f"written: {path}, with the reason for each choice\nnext:\n{commands}", soft_wrap=True, markup=False)


def output_path(path: Path) -> Path:
    """Return where the recipe goes.

    Raises:
        RequestError: no YAML file, or one that exists.
    """
    if path.suffix not in (".yaml", ".yml"):
        raise RequestError(f"--output: found {path}, expected the name of a recipe file, ending in .yaml")
    if path.exists():
        raise RequestError(f"{path}: exists already; give another file with --output, or remove it")
    return path


def card_for(gpu: str | None) -> Card | None:
    """Return the card to plan for: the one named, this machine's, or None.

    Raises:
        RequestError: no single card has this name.
    """
    if gpu:
        cards = find_cards(gpu)
        if len(cards) != 1:
            raise RequestError(f"--gpu: found {gpu}, expected one card: its name, or its size such as 12GB")
        return cards[0]
    import torch

    return card_here(torch.device("cuda"))[0] if torch.cuda.is_available() else None


# ---- choices ---------------------------------------------------------------------------------------------------------


def choose(draft: Draft, card: Card | None) -> Pairs:
    """Make every choice of a recipe, and return its pairs.

    Raises:
        RequestError: data or model cannot be used or had, or nothing fits the card.
    """
    from orpo_lite.data import load_pairs, pair_lengths
    from orpo_lite.model import load_tokenizer
    from orpo_lite.model.locating import read_config, renaming_field
    from orpo_lite.plan.before_training import Lengths

    spec = draft.recipe().model
    with renaming_field("--model"):
        check_model_path(spec.name_or_path)
        config, tokenizer = read_config(spec), load_tokenizer(spec)
    choose_template(draft, tokenizer)
    size = count_parameters(draft, config)
    choose_model(draft, size)
    tokenizer = load_tokenizer(draft.recipe().model)
    unlimited = {"max_length": None, "max_prompt_length": None, "max_completion_length": None}
    whole = draft.recipe(**unlimited, eval=None, eval_fraction=0).data
    pairs = load_pairs(whole, tokenizer)
    choose_lengths(draft, pair_lengths(pairs.train), config)
    choose_steps(draft, len(pairs.train), size, card)
    if card:
        fit_card(draft, card, Lengths.of(pairs))
    return load_pairs(draft.recipe().data, tokenizer)


def choose_template(draft: Draft, tokenizer: Any) -> None:
    """Choose the chat template, whether plain text gets it, and its variables."""
    from orpo_lite.data.row_shapes import BARE_STRINGS, FAMILY, source_shape
    from orpo_lite.data.sources import open_source
    from orpo_lite.model import load_tokenizer
    from orpo_lite.model.tokenizer import variables

    data = draft.recipe().data
    source = open_source(data.train[0], data.split, data.columns, SAMPLE, "data.train")
    rows = list(source.rows())
    shape, text = source_shape(rows, source.label, False), json.dumps(rows, ensure_ascii=False, default=str)
    chat, template = FAMILY[shape] == "conversations", str(tokenizer.chat_template or "")
    added = {token.content for token in tokenizer.added_tokens_decoder.values() if token.content.strip()}
    marks = sorted(token for token in added if token in template and token in text)
    if chat and not template:
        name, why = (
            "zephyr",
            "zephyr's marks are plain text and its turns end with EOS, so no token is new to the model",
        )
        if {"<|im_start|>", "<|im_end|>"} <= added:
            name, why = "chatml", "its vocabulary has ChatML's tokens"
        draft.choose("model.chat_template", name, f"the rows are conversations and the model has no template; {why}")
    elif not chat:
        apply, why = True, "the rows are plain text, and the model is used in chats: a user's and an assistant's turn"
        if not template:
            apply, why = (
                False,
                "the model has no template: it continues the text (for chats, set model.chat_template and true)",
            )
        elif marks:
            apply, why = False, f"the text holds the template's marks already ({', '.join(marks[:3])})"
        elif shape == BARE_STRINGS:
            apply, why = False, "the rows have no prompt column, so nothing shows where the answer starts"
        draft.choose("data.apply_template", apply, why)
    recipe = draft.recipe()
    tokenizer = load_tokenizer(recipe.model)  # with the template just chosen
    known = variables(tokenizer)[1] if chat or recipe.data.apply_template else []
    given: dict[str, tuple[Any, str]] = {}
    if "enable_thinking" in known and not any(mark in text for mark in REASONING):
        given["enable_thinking"] = False, "the answers hold no reasoning"
    if "date_string" in known and "strftime_now" in str(tokenizer.chat_template):
        given["date_string"] = "26 Jul 2024", "pinned, so that two runs see the same tokens"
    if given:
        why = "; ".join(f"{name}: {why}" for name, (_, why) in given.items())
        draft.choose("data.template_kwargs", {name: value for name, (value, _) in given.items()}, why)


def count_parameters(draft: Draft, config: Any) -> int:
    """Count the base's parameters, without its weights."""
    import torch

    from orpo_lite.model.inspection import trainable_share
    from orpo_lite.plan.meta_model import build

    recipe = draft.recipe()
    model = recipe.model.model_copy(update={"quantization": "none", "new_tokens": []})
    plain = recipe.model_copy(update={"model": model, "adapter": None})
    return trainable_share(build(plain, config, torch.float32, None, False))[1]


def choose_model(draft: Draft, size: int) -> None:
    """Choose quantization and adapter by the model's parameters."""
    whole = draft.content["adapter"] is None
    bits = "nf4" if size >= LARGE and not whole else "none"
    saves = "4 bits save much of the card" if size >= LARGE else "4 bits would save little"
    why = f"{count(size)} parameters: {saves}"
    draft.choose("model.quantization", bits, "full fine-tuning, without an adapter" if whole else why)
    if not whole:
        draft.choose("adapter.r", 16, "the usual rank, and twice as much alpha")
        draft.choose("adapter.alpha", 32)


def count(parameters: int) -> str:
    """Write a number of parameters, for example 7.2 B."""
    return f"{parameters / 1e9:.1f} B" if parameters >= 1e9 else f"{parameters / 1e6:.1f} M"


def choose_lengths(draft: Draft, lengths: dict[str, np.ndarray], config: Any) -> None:
    """Choose limits of tokens that cut nothing, or little where a few pairs are far longer than the rest."""
    import numpy as np

    answers = np.maximum(lengths["chosen"], lengths["rejected"])
    places = getattr(config.get_text_config(), "max_position_embeddings", None)
    draft.choose("data.max_length", *length_for(lengths["prompt"] + answers, places))
    longest = math.ceil(int(np.percentile(answers, 95)) / 32) * 32
    draft.choose("evaluation.max_new_tokens", min(longest, 512), "sample answers: 95 of 100 answers here are no longer")


def length_for(tokens: np.ndarray, places: int | None) -> tuple[int, str]:
    """Return a limit for some lengths, (N,), and what it does; at most the model's number of places."""
    import numpy as np

    top, high = int(tokens.max()), math.ceil(np.percentile(tokens, 99))
    limit = math.ceil((top if top <= 1.5 * high else high) / 64) * 64
    model = ", the model's longest" if places and limit > places else ""
    limit = min(limit, places or limit)
    cut = int((tokens > limit).sum())
    longer = f"{cut:,} of {counted(len(tokens), 'pair')} {'is' if cut == 1 else 'are'} longer and dropped (data.overlong: truncate cuts them)"
    cuts = longer if cut else "nothing is cut"
    why = f"the longest prompt with an answer has {top:,} tokens, 99 of 100 have at most {high:,}{model}; {cuts}"
    return limit, why


def choose_steps(draft: Draft, pairs: int, size: int, card: Card | None) -> None:
    """Choose what is held out, batch, epochs, learning rate and how often to evaluate, by the number of pairs."""
    fewest, most = HELD_OUT
    share = 0.05
    if pairs * share < fewest:
        share = min(0.2, math.ceil(100 * fewest / pairs) / 100) if pairs > 1 else 0.0
    if not draft.content["data"].get("eval"):
        some = f"about {counted(min(round(pairs * share), most), 'pair')} held out, by prompt; data.eval would name a file of them"
        draft.choose("data.eval_fraction", share, some)
        if pairs * share > most:
            draft.choose("data.max_eval_rows", most, "more would cost time at each evaluation, and tell little more")
    left = max(1, pairs - min(round(pairs * share), most))
    batch = 8 if left < 1000 else 16 if left < 20_000 else 32
    steps = math.ceil(left / batch)
    epochs = max(1, min(MOST_EPOCHS, math.ceil(FEW_STEPS / steps)))
    every = max(1, min(100, steps * epochs // 5))
    rate = next(rate for least, rate in RATES if size >= least) if draft.content["adapter"] is not None else "8e-6"
    tiny = size < TINY
    auto = "micro-batches as large as the card in use holds, planned when the run starts"
    for place, value, why in (
        ("orpo.beta", 0.5 if size < 1e9 else 0.1, "0.1 is the paper's for 7B; its authors advise 0.5 to 1.0 for small models (xfactlab/orpo#5)"),
        ("training.learning_rate", rate, f"where to start for {count(size)} parameters; tune it first: half to four times as much"),
        ("training.lr_scheduler_type", "cosine", ""),
        ("training.warmup_steps", 0.1, "a tenth of all steps"),
        ("training.num_train_epochs", epochs, f"of {counted(steps, 'step')}; more where they are few, up to {MOST_EPOCHS}"),
        ("training.per_device_train_batch_size", batch if tiny else "auto", "the whole step: the model is tiny" if tiny else auto),
        ("training.gradient_accumulation_steps", 1 if tiny else batch,
         f"{batch} pairs a step: 8 for few pairs, 16 from 1,000 and 32 from 20,000 on"),
        ("training.per_device_eval_batch_size", 8 if tiny or card else 1, ""),
        ("training.optim", "paged_adamw_8bit" if size >= LARGE else "adamw_torch", ""),
        ("training.logging_steps", max(1, min(10, every // 2)), ""),
        ("training.eval_strategy", "steps", ""),
        ("training.eval_steps", every, f"of {steps * epochs:,}"),
        ("training.save_strategy", "steps", ""),
        ("training.save_steps", every, "checkpoints, to resume from"),
    ):  # fmt: skip
        draft.choose(place, value, why)


def fit_card(draft: Draft, card: Card, lengths: Lengths) -> None:
    """Choose micro-batch, checkpointing and, if nothing else fits, shorter lengths by the plan for a card.

    Raises:
        RequestError: nothing that was tried fits.
    """
    from orpo_lite.plan.search import Planner, Search

    recipe = draft.recipe()
    found = Search(recipe, card, Planner(lengths.shape)).first_that_fits(shorten=True)
    if found is None:
        raise RequestError(f"--gpu: nothing that was tried fits {card.title}: use a larger card or a smaller model")
    needs = f"{found.plan.needed / 1e9:.1f} GB of {card.title}, as planned"
    reasons = {
        "orpo.tokens_per_batch": f"{found.pairs} of the longest pairs at a time, {needs}; a step keeps its pairs",
        "memory.checkpointing": "layers that recompute their activations: the fastest that fits, by plan",
        "memory.offload_activations": "nothing fits without it, by plan",
        "model.quantization": "nothing fits without it, by plan",
        "data.max_length": f"shortened to fit {card.title}: pairs that are longer are dropped",
    }
    for word in found.words:
        place, _, value = word.partition("=")
        if not recipe.plans_batches or place not in ("orpo.tokens_per_batch", "memory.checkpointing"):
            draft.choose(place, yaml.safe_load(value), reasons.get(place, ""))
    if "needs" not in draft.why:
        draft.content["needs"] = f"{needs}: {counted(found.pairs, 'pair')} of the longest at once, {found.layers}"


if __name__ == "__main__":
    run_command(command)
