"""Score sampled answers by what takes time: a reward model, the log-odds under a model, a judge, or the user's choice."""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted, cut
from orpo_lite.evaluate import terminal
from orpo_lite.evaluate.answer_file import ResultFile
from orpo_lite.evaluate.answering import find_sides
from orpo_lite.evaluate.judge import Judge, judge_answers
from orpo_lite.model.base import local_device
from orpo_lite.model.locating import hub_errors_in_words, locate, renaming_field
from orpo_lite.model.precision import choose_precision
from orpo_lite.model.tokenizer import TemplateRefused, render_chat
from orpo_lite.objective.loss import log1mexp
from orpo_lite.recipe import ModelSection

if TYPE_CHECKING:
    from orpo_lite.evaluate.pairs import Group

Scores = list[float | None]
"""One for each answer, more is better; None where it has none."""
YOU = "you"


@dataclass
class Ranker:
    """Score the answers to a prompt in one of the ways that the command line names."""

    name: str
    key: str
    """Part of the name of the file that its scores are written to as they come."""
    score: Callable[[Group], Scores]
    """Scores two answers or more; raises EOFError where the user ends the rating."""
    weights: str | None = None
    """Hash of an adapter that scores, so that another's scores are not taken for its own."""

    def scores(self, groups: list[Group], file: Path) -> list[Scores]:
        """Score the answers to all prompts, fewer where the user ends before; those in the file are kept."""
        ranker = {"ranker": self.name, "weights": self.weights}
        tasks = [ranker | {"prompt": one.prompt, "answers": one.answers} for one in groups]
        results = ResultFile(file, tasks)
        bar = progress(self.name, len(groups), len(results.rows)) if self.key != YOU else contextlib.nullcontext(id)
        with bar as advance, contextlib.suppress(EOFError):
            for group in groups[len(results.rows) :]:
                if self.key == YOU:
                    console.print(f"\n{len(results.rows) + 1:,} of {counted(len(groups), 'prompt')}", style="dim")
                alone: Scores = [0.0] * len(group.answers)
                results.append({"scores": self.score(group) if len(alone) > 1 else alone})
                advance(1)
        return [row["scores"] for row in results.rows]


def reward_model(model: str, trust_remote_code: bool = False) -> Ranker:
    """Rank by a sequence classifier with one output, which reads prompt and answer in its own chat template.

    It scores None where these are longer than it takes.

    Raises:
        RequestError: no such model, one without a single score, or without a chat template.
    """
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    with renaming_field("--reward-model"), hub_errors_in_words(model):
        place = locate(ModelSection(name_or_path=model))
        tokenizer = AutoTokenizer.from_pretrained(place, **options)
        config = AutoConfig.from_pretrained(place, **options)
    if config.num_labels != 1 or not tokenizer.chat_template:
        template = "a" if tokenizer.chat_template else "no"
        raise RequestError(
            f"--reward-model: {model} has {counted(config.num_labels or 0, 'output')} and {template} chat template, expected one "
            "output, the reward, and a template to write prompt and answer by: name another model"
        )
    longest = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf

    @functools.cache
    def loaded() -> Any:
        device, classifier = local_device(), AutoModelForSequenceClassification
        with hub_errors_in_words(model):
            dtype = choose_precision(device=device).dtype
            return classifier.from_pretrained(place, use_safetensors=True, dtype=dtype, **options).to(device).eval()

    @torch.no_grad()
    def score(group: Group) -> Scores:
        found: Scores = []
        for answer in group.answers:  # one at a time: padding shifts what some classifiers read
            turns = [*group.prompt, {"role": "assistant", "content": answer}]
            try:
                text = render_chat(tokenizer, turns)
            except TemplateRefused as refusal:
                why = f"the template of {model} does not take prompt {group.id} ({refusal})"
                raise RequestError(f"--reward-model: {why}: leave such prompts out, or name another model") from None
            ids = tokenizer(text, add_special_tokens=False, return_tensors="pt")["input_ids"]
            fits = ids.shape[1] <= longest
            found.append(loaded()(input_ids=ids.to(loaded().device)).logits[0, 0].item() if fits else None)
        return found

    return Ranker(f"reward of {model}", "reward", score)


def log_odds(run: str, trust_remote_code: bool = False) -> Ranker:
    """Rank by the log-odds of each answer under a model, in the form in which training would see it.

    It scores None for two answers, which are read together, that training would drop.
    """
    side = find_sides(run, trust_remote_code)[-1]

    def score(group: Group) -> Scores:
        found: Scores = [None] * len(group.answers)
        for one in range(0, len(found), 2):
            two = (one + 1) % len(found)
            with contextlib.suppress(RequestError):
                logps = side.mean_logps(group.prompt, group.answers[one], group.answers[two])
                found[one], found[two] = (logps - log1mexp(logps)).tolist()
        return found

    return Ranker(f"log-odds under {run}", "log-odds", score, side.identity().get("weights"))


class Comparisons:
    """A judge who compares each answer with two others, in both orders; wins less losses, and ties count nothing."""

    key = "judge"

    def __init__(self, judge: Judge):
        self.judge = judge
        self.summary = dict[str, Any]()
        """Counts of all verdicts."""

    def scores(self, groups: list[Group], file: Path) -> list[Scores]:
        """Have the answers to all prompts compared; verdicts that are in the file are kept."""
        rows, met = [], []
        for number, group in enumerate(groups):
            count = len(group.answers)
            for one in range(count if count > 2 else count - 1):
                two = (one + 1) % count
                texts = {"first": [group.answers[one]], "second": [group.answers[two]]}
                rows.append({"id": group.id, "prompt": group.prompt, "turns": [], "answers": texts})
                met.append((number, one, two))
        self.summary = judge_answers(self.judge, rows, ("first", "second"), file)
        found: list[Any] = [[0.0] * len(group.answers) for group in groups]
        for (number, one, two), winner in zip(met, self.summary.pop("winners"), strict=True):
            won = {"first": 1, "second": -1}.get(winner, 0)
            found[number][one] += won
            found[number][two] -= won
        return found


def your_choice() -> Ranker:
    """Rank by the user at the terminal, who names the best and the worst answer to a prompt.

    These score 1 and -1, the others 0, and all of them 0 where the user skips the prompt.
    """

    def score(group: Group) -> Scores:
        console.print(f"{cut(str(group.prompt[-1]['content']), 600)}", style="bold", markup=False)
        for number, answer in enumerate(group.answers, 1):
            console.print(f"{number}  {answer}", markup=False)
        found: Scores = [0.0] * len(group.answers)
        places = {str(place + 1): place for place in range(len(found))}
        for word, points in (("best", 1.0), ("worst", -1.0)):
            ask = f"{word}, 1 to {len(found)}; Enter skips, Ctrl-D ends> "
            while (said := terminal.read(ask, terminal.InMemoryHistory())) not in places:
                if not said:
                    return [0.0] * len(found)
                console.print(f"found {said[:40]}, expected the number of another answer", markup=False)
            found[places.pop(said)] = points
        return found

    return Ranker("your choice", YOU, score)
