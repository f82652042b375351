"""Score sampled answers: by rules, a reward model, the log-odds under a model, a judge, or the user's choice."""

import contextlib
import hashlib
import json
import math
import re
import runpy
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from orpo_lite.common.console import console, progress
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted, cut, shown
from orpo_lite.evaluate import terminal
from orpo_lite.evaluate.answer_file import ResultFile
from orpo_lite.evaluate.answering import Turns, find_sides
from orpo_lite.evaluate.judge import Endpoint, LocalJudge, judge_rows, summary
from orpo_lite.model.base import local_device
from orpo_lite.model.locating import hub_errors_in_words, locate, renaming_field
from orpo_lite.model.precision import choose_precision
from orpo_lite.objective.loss import log1mexp
from orpo_lite.recipe import ModelSection

Scores = list[float | None]
"""One for each answer, more is better; None where it has none."""


@dataclass
class Group:
    """The different answers to one prompt that can be part of a pair."""

    id: str
    prompt: Turns
    answers: list[str]
    left_out: Counter[str]
    """Why others are not among them, and how many."""
    held_out: bool
    scores: list[Scores] = field(default_factory=list)
    """Of each ranker."""
    totals: list[float] = field(default_factory=list)
    """The score of each answer by all rankers together."""

    @classmethod
    def of(cls, rows: list[dict[str, Any]], share: float) -> "Group":
        """Leave out answers that are empty, cut by a limit or repeated; hold a share of all prompts out.

        Args:
            rows: of the file of answers, all of one prompt.
        """
        answers, left, prompt = list[str](), Counter[str](), rows[0]["prompt"]
        for row in rows:
            [[text]], [[ended]] = row["answers"].values(), row["ended"].values()
            unfit = {"empty": not text.strip(), "cut at --max-new-tokens": not ended, "repeated": text in answers}
            why = next((reason for reason, found in unfit.items() if found), None)
            answers += [] if why else [text]
            left.update([why] if why else [])
        # by the prompt alone, so that it stays on its side in the next round
        place = int(hashlib.sha256(json.dumps(prompt, sort_keys=True).encode()).hexdigest()[:12], 16) / 16**12
        return cls(rows[0]["id"], prompt, answers, left, place < share)


def shuffled(seed: int, texts: list[str]) -> list[int]:
    """Return the places of distinct texts in an order that tells nothing about them."""
    return sorted(range(len(texts)), key=lambda place: hashlib.sha256(f"{seed} {texts[place]!r}".encode()).digest())


class Ranker:
    """What scores the answers to a prompt."""

    key = ""
    """Part of the name of the file that its scores are written to as they come."""
    asks = False
    """True where the user answers, so that no progress may be drawn."""

    def __init__(self, name: str):
        self.name = name

    def score(self, group: Group) -> Scores:
        """Score the answers to one prompt.

        Raises:
            EOFError: the user ends the rating.
        """
        raise NotImplementedError

    def scores(self, groups: list[Group], file: Path) -> list[Scores]:
        """Score the answers to all prompts, fewer where the user ends before; those in the file are kept."""
        tasks = [{"ranker": self.name, "prompt": one.prompt, "answers": one.answers} for one in groups]
        results = ResultFile(file, tasks)
        bar = (
            contextlib.nullcontext(lambda _: None) if self.asks else progress(self.name, len(groups), len(results.rows))
        )
        with bar as advance, contextlib.suppress(EOFError):
            for group in groups[len(results.rows) :]:
                alone = [0.0] * len(group.answers)
                results.append({"scores": self.score(group) if len(alone) > 1 else alone})
                advance(1)
        return [row["scores"] for row in results.rows]


class Rule(Ranker):
    """A check of one answer by itself: 1 where it holds and 0 where not, or a number from the user's own function."""

    def __init__(self, name: str, check: Callable[[Turns, str], Any]):
        super().__init__(name)
        self.check = check

    def scores(self, groups: list[Group], file: Path) -> list[Scores]:
        """Score all answers; nothing is written, since it is quick.

        Raises:
            RequestError: the user's function fails, or returns no finite number.
        """
        return [[self.points(group.prompt, answer) for answer in group.answers] for group in groups]

    def points(self, prompt: Turns, answer: str) -> float:
        """Score one answer."""
        try:
            score = float(self.check(prompt, answer))
            if math.isfinite(score):
                return score
            raise ValueError(f"it gives {score}")
        except Exception as error:  # whatever the user's function raises
            why = f"{type(error).__name__}: {error}"
            raise RequestError(f"--rule: {self.name} fails on {shown(answer)} ({why}): fix it") from error


def find_rules(
    must: list[str], must_not: list[str], min_words: int | None, max_words: int | None, as_json: bool, function: str | None
) -> list[Rule]:  # fmt: skip
    """Return the rules that the command line names.

    Raises:
        RequestError: a pattern that is no regular expression, or a function that is not there.
    """
    found = [Rule(f"must match {text[:40]}", matcher("--must", text, True)) for text in must]
    found += [Rule(f"must not match {text[:40]}", matcher("--must-not", text, False)) for text in must_not]
    if min_words is not None:
        found.append(Rule(f"at least {min_words} words", lambda _, answer: len(answer.split()) >= min_words))
    if max_words is not None:
        found.append(Rule(f"at most {max_words} words", lambda _, answer: len(answer.split()) <= max_words))
    if as_json:
        found.append(Rule("valid JSON", lambda _, answer: is_json(answer)))
    if function:
        found.append(Rule(function, find_function(function)))
    return found


def matcher(option: str, pattern: str, wanted: bool) -> Callable[[Turns, str], bool]:
    """Return a check for a regular expression, searched without regard to case as a recipe's `evaluation.rule` is."""
    try:
        compiled = re.compile(pattern, re.IGNORECASE)
    except re.error as error:
        raise RequestError(f"{option}: {shown(pattern)} is no regular expression ({error}): fix it") from None
    return lambda _, answer: bool(compiled.search(answer)) == wanted


def is_json(text: str) -> bool:
    """Return True for one JSON value and nothing else."""
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def find_function(place: str) -> Callable[[Turns, str], Any]:
    """Return the function that FILE.py:FUNCTION names; the file is run.

    Raises:
        RequestError: no such file, it fails, or it has no such function.
    """
    file, _, name = place.rpartition(":")
    try:
        return runpy.run_path(file)[name]
    except Exception as error:  # whatever the user's file raises
        raise RequestError(
            f"--rule: found {place}, expected FILE.py:FUNCTION, a function of the prompt's messages and the answer "
            f"({type(error).__name__}: {error})"
        ) from error


class RewardModel(Ranker):
    """A sequence classifier with one output, which reads prompt and answer in its own chat template.

    Raises:
        RequestError: no such model, one without a single score, or without a chat template.
    """

    key = "reward"

    def __init__(self, model: str, trust_remote_code: bool = False):
        super().__init__(f"reward of {model}")
        self.model, options = model, {"trust_remote_code": trust_remote_code}
        with renaming_field("--reward-model"), hub_errors_in_words(model):
            place = locate(ModelSection(name_or_path=model))
            self.tokenizer = AutoTokenizer.from_pretrained(place, **options)
            config = AutoConfig.from_pretrained(place, **options)
        if config.num_labels != 1 or not self.tokenizer.chat_template:
            template = "a" if self.tokenizer.chat_template else "no"
            raise RequestError(
                f"--reward-model: {model} has {counted(config.num_labels or 0, 'output')} and {template} chat template, expected one "
                "output, the reward, and a template to write prompt and answer by: name another model"
            )
        self.places = getattr(config.get_text_config(), "max_position_embeddings", None) or math.inf
        self.load = partial(AutoModelForSequenceClassification.from_pretrained, place, use_safetensors=True, **options)

    @cached_property
    def loaded(self) -> Any:
        """The model, in 16 bits on a card."""
        device = local_device()
        with renaming_field("--reward-model"), hub_errors_in_words(self.model):
            return self.load(dtype=choose_precision(device=device).dtype).to(device).eval()

    @torch.no_grad()
    def score(self, group: Group) -> Scores:
        """Score the answers to one prompt; None for one that is longer than the model takes."""
        found: Scores = []
        for answer in group.answers:  # one at a time: padding shifts what some classifiers read
            turns = [*group.prompt, {"role": "assistant", "content": answer}]
            ids = self.tokenizer.apply_chat_template(turns, return_tensors="pt", return_dict=True)["input_ids"]
            fits = ids.shape[1] <= self.places
            found.append(self.loaded(input_ids=ids.to(self.loaded.device)).logits[0, 0].item() if fits else None)
        return found


class LogOdds(Ranker):
    """The log-odds of each answer under a model, in the form in which training would see it."""

    key = "log-odds"

    def __init__(self, run: str, trust_remote_code: bool = False):
        super().__init__(f"log-odds under {run}")
        self.side = find_sides(run, trust_remote_code)[-1]

    def score(self, group: Group) -> Scores:
        """Score the answers to one prompt; None for one that training would drop."""
        found: Scores = []
        for place, answer in enumerate(group.answers):
            try:
                logp = self.side.mean_logps(group.prompt, answer, group.answers[place - 1])[0]
                found.append((logp - log1mexp(logp)).item())
            except RequestError:
                found.append(None)
        return found


class Judge(Ranker):
    """A judge who compares each answer with two others, in both orders; wins less losses, and ties count nothing."""

    key = "judge"
    NAMES = ("first", "second")

    def __init__(self, judge: LocalJudge | Endpoint, seed: int):
        super().__init__(f"judge {judge}")
        self.judge, self.seed = judge, seed
        self.summary: dict[str, Any] | None = None
        """Of all verdicts."""

    def scores(self, groups: list[Group], file: Path) -> list[Scores]:
        """Have the answers to all prompts compared; verdicts that are in the file are kept."""
        rows, met = [], []
        for number, group in enumerate(groups):
            order = shuffled(self.seed, group.answers)
            circle = list(zip(order, order[1:] + order[:1], strict=True))[: None if len(order) > 2 else len(order) - 1]
            for two in circle:
                texts = {name: [group.answers[place]] for name, place in zip(self.NAMES, two, strict=True)}
                rows.append({"id": group.id, "prompt": group.prompt, "turns": [], "answers": texts})
                met.append((number, *two))
        verdicts = judge_rows(self.judge, rows, self.NAMES, file)
        found: list[Any] = [[0.0] * len(group.answers) for group in groups]
        for (number, first, second), verdict in zip(met, verdicts, strict=True):
            won = {"first": 1, "second": -1}.get(verdict["winner"], 0)
            found[number][first] += won
            found[number][second] -= won
        self.summary = summary(rows, verdicts, self.NAMES) if rows else None
        return found


class You(Ranker):
    """The user at the terminal, who names the best and the worst answer, shown in an order that tells nothing."""

    key, asks = "you", True

    def __init__(self, seed: int):
        super().__init__("your choice")
        self.seed = seed

    def score(self, group: Group) -> Scores:
        """Ask for the best and the worst: 1, -1 and 0 for the rest, all 0 where the user skips."""
        order = shuffled(self.seed, group.answers)
        console.print(f"\n{cut(str(group.prompt[-1]['content']), 600)}", style="bold", markup=False)
        for number, place in enumerate(order, 1):
            console.print(f"{number}  {group.answers[place]}", markup=False)
        found: Scores = [0.0] * len(order)
        numbers = {str(number): place for number, place in enumerate(order, 1)}
        for word, score in (("best", 1.0), ("worst", -1.0)):
            ask = f"{word}, 1 to {len(order)}; Enter skips, Ctrl-D ends> "
            while (said := terminal.read(ask, terminal.InMemoryHistory())) not in numbers:
                if not said:
                    return [0.0] * len(order)
                console.print(f"found {said[:40]}, expected the number of another answer", markup=False)
            found[numbers.pop(said)] = score
        return found
