"""`orpo-lite sweep`: train a recipe with several values of some fields, one run after another, and say which won."""

import contextlib
import itertools
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
import yaml
from rich.markup import escape
from rich.table import Table

from orpo_lite.common.console import console, errors, processes, progress, rank, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import is_locked, lock_folder, write_atomically
from orpo_lite.common.text import counted, duration, next_command
from orpo_lite.evaluate.held_out import sign_test
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.listing import RECIPE_OPTION
from orpo_lite.train.__main__ import check_local_files
from orpo_lite.trainer.run_folder import LOG, RunFolder, differences
from orpo_lite.trainer.run_record import LoadedRun, When, read_run

VALUE = re.compile(r"""(?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+""")
"""One of several values; what is in brackets or quotes keeps its commas."""
NOT_COMPARED = re.compile(
    r"(name|description|needs|model|data|evaluation(\..*)?|training\.(output_dir|run_name|per_device_eval_batch_size)"
    r"|model\.(?!quantization|double_quant|dtype|attention).*|data\.(?!train$|max_rows$|deduplicate$).*)$"
)
"""Fields with which a run has another base, other held-out pairs, or another measure."""
LAUNCHERS = re.compile(r"(LOCAL_|GROUP_|ROLE_)?(RANK|WORLD_SIZE)$|MASTER_|ACCELERATE_|TORCHELASTIC_(?!RUN_ID)")
"""Variables by which torchrun and accelerate make processes one run; the one left out says that signals come twice."""
KEEP = 3
"""Halving keeps one of so many trials at each rung, and makes the next ones so many times as long."""
TIED = (
    "of tied trials the one with fewer pairs to train wins, then fewer parameters, then clearly larger margins at a chosen answer "
    "no less likely, then the smaller value"
)


class Trial:
    """A run of a sweep; once it has finished, what decides."""

    def __init__(self, source: str, words: list[str], settings: dict[str, str], folder: Path, share: float):
        self.settings, self.folder, self.trouble = settings, folder, ""
        self.words = [*words, *(f"{key}={value}" for key, value in settings.items()), f"training.output_dir={folder}"]
        with contextlib.redirect_stderr(None):  # what other data drops from the recipe was said before
            self.words += shortened(Recipe.load(source, self.words), share)
            self.recipe = Recipe.load(source, self.words)

    def __str__(self) -> str:
        values = (f"{key.rpartition('.')[2]}={value}" for key, value in self.settings.items())
        return f"{self.folder.name} ({', '.join(values)})"

    def read(self) -> bool:
        """Read what a finished run has measured; return False for an unfinished one."""
        if not RunFolder(self.folder).finished:
            return False
        self.run: LoadedRun = read_run(self.folder)
        record, rule = self.run.record, self.recipe.evaluation.rule
        kept, (before, after) = self.run.pairs.after, (record.evaluation(when) for when in ("before", "after"))
        self.chosen = kept.get("logps/chosen", [])
        self.margins = [a - b for a, b in zip(self.chosen, kept.get("logps/rejected", []), strict=True)]
        self.right = [margin > 0 for margin in self.margins]
        answers = record.samples.get("after", []) if rule else []
        self.in_style = [bool(rule and re.search(rule.chosen, one.answer, re.IGNORECASE)) for one in answers]
        self.costs = (record.steps or 0) * (record.effective_batch or 0), record.parameters.get("trainable", 0)
        old, new = before.get("nll_loss") or 0.0, after.get("nll_loss") or 0.0
        if not self.margins:
            self.trouble = "has no held-out figures"
        elif not all(map(math.isfinite, [*self.margins, new])) or new > 2 * old:
            self.trouble = f"diverged: held-out NLL {new:.2f}, the base's {old:.2f}"
        return True

    def tell(self) -> None:
        """Print what became of it."""
        took = f", {duration(self.run.record.total_seconds or 0)}" if hasattr(self, "run") else ""
        said = self.trouble or accuracy(self.run.record.evaluation("after"))
        console.print(f"{self}: {said}{took}", markup=False, style="red" * bool(self.trouble))


def gathered(mine: Any) -> list[Any]:
    """Return what each process of a launcher passes here, in the order of their ranks."""
    if processes() == 1:
        return [mine]
    import torch

    from orpo_lite.trainer.distributed import init_process_group

    # for a week, since trials of other cards may take long; on the CPU, since the card is the trials'
    init_process_group(7 * 24 * 3600.0, use_cpu=True)
    found = [None] * processes()
    torch.distributed.all_gather_object(found, mine)
    return found


def of_one_card() -> dict[str, str]:
    """Return the environment of a run of its own, which sees one card where a launcher has started a process for each."""
    if processes() == 1:
        return dict(os.environ)
    local, seen = int(os.environ.get("LOCAL_RANK", 0)), os.environ.get("CUDA_VISIBLE_DEVICES", "")
    kept = {name: value for name, value in os.environ.items() if not LAUNCHERS.match(name)}
    return kept | {"CUDA_VISIBLE_DEVICES": seen.split(",")[local] if seen else str(local)}


def is_clear(better: Sequence[float], other: Sequence[float]) -> bool:
    """Tell whether one is above the other on the same pairs, by the sign test (p < 0.05)."""
    wins = sum(a > b for a, b in zip(better, other, strict=True))
    losses = sum(a < b for a, b in zip(better, other, strict=True))
    return wins > losses and sign_test(wins, losses) < 0.05


def decide(trials: Sequence[Trial]) -> tuple[Trial, list[Trial]]:
    """Return the winner of trials in the order of their values, and those that the rule of `TIED` decided against."""
    tied = list(trials)
    for name in ("right", "in_style"):
        best = max(tied, key=lambda one: (sum(getattr(one, name)), sum(one.margins)))
        tied = [one for one in tied if not is_clear(getattr(best, name), getattr(one, name))]
    least = min(one.costs for one in tied)
    left = [one for one in tied if one.costs == least]
    top = max(left, key=lambda one: sum(one.margins))
    left = [one for one in left if not is_clear(top.margins, one.margins) or is_clear(one.chosen, top.chosen)]
    return left[0], [one for one in tied if one is not left[0]]


def searched(words: list[str]) -> dict[str, list[str]]:
    """Return the fields that are given several values, numbers in their order.

    Raises:
        RequestError: there is none, or one whose runs could not be compared.
    """
    space: dict[str, list[str]] = {}
    for key, _, value in (word.partition("=") for word in words):
        if len(values := list(dict.fromkeys(VALUE.findall(value)))) > 1:
            with contextlib.suppress(ValueError):
                values.sort(key=float)
            space[key] = values
    for key in filter(NOT_COMPARED.match, space):
        raise RequestError(
            f"{key}: found {counted(len(space[key]), 'value')}; with another base, other held-out pairs or another measure runs "
            "cannot be told apart by a sweep: train them one by one, and compare them with `orpo-lite report RUN RUN`. A value "
            f"that holds a comma goes into quotes of its own: '{key}=\"a,b\"'"
        )
    if not space:
        raise RequestError(
            "found no field with several values: separate them by commas, for example training.learning_rate=2e-5,5e-5,1e-4; "
            "lists keep their brackets: 'adapter.target_modules=[q_proj,v_proj],all-linear'"
        )
    return space


def shortened(recipe: Recipe, share: float) -> list[str]:
    """Return the words that give a recipe a share of its steps, with the schedule of so many; none for all of them."""
    given, steps = recipe.training, recipe.training.get("max_steps", -1)
    fields = {"num_train_epochs": round(given.get("num_train_epochs", 3) * share, 6)}
    if steps > 0:
        fields = {"max_steps": max(1, round(steps * share))}
    if (warmup := given.get("warmup_steps") or 0) >= 1:  # below 1 it is a share itself
        fields["warmup_steps"] = max(1, round(warmup * share))
    return [f"training.{key}={value}" for key, value in fields.items() if share < 1]


def pairs_of(recipe: Recipe) -> float:
    """Return the pairs that a recipe trains on, each pass counted."""
    if (steps := recipe.training.get("max_steps", -1)) > 0:
        return steps * recipe.pairs_at_once * (recipe.training.get("gradient_accumulation_steps") or 1)
    from orpo_lite.data import load_pairs
    from orpo_lite.model import load_tokenizer

    return len(load_pairs(recipe.data, load_tokenizer(recipe.model)).train) * recipe.training.get("num_train_epochs", 3)


class Sweep:
    """Runs trials within a budget."""

    def __init__(self, source: str, folder: Path, minutes: float | None, pairs: int | None):
        self.source, self.folder = source, folder
        self.pairs = math.inf if pairs is None else pairs / processes()
        self.end = math.inf if minutes is None else time.monotonic() + 60 * minutes
        self.longest, self.stopped, self.left = 0.0, False, list[Trial]()

    def run(self, trials: Sequence[Trial]) -> list[Trial]:
        """Train those that have not finished before, one on each card at a time; return those with figures to decide on."""
        mine = trials[rank() :: processes()]
        for trial in mine:
            if not trial.read():
                room = self.pairs == math.inf or pairs_of(trial.recipe) <= self.pairs
                if self.stopped or not room or time.monotonic() + self.longest > self.end or not self.train(trial):
                    continue
            if trial.read():
                self.pairs -= trial.costs[0]
            trial.tell()
        stopped, troubles = zip(*gathered((self.stopped, [trial.trouble for trial in trials])), strict=True)
        self.stopped = any(stopped)
        for trial, said in zip(trials, zip(*troubles, strict=True), strict=True):
            trial.trouble = max(said)
            if not trial.read() and not trial.trouble:
                self.left.append(trial)
            elif trial not in mine:
                trial.tell()
        return [trial for trial in trials if trial not in self.left and not trial.trouble]

    def train(self, trial: Trial) -> bool:
        """Train in a process of its own; return False if Ctrl-C or the budget's end stopped it, with a checkpoint."""
        trial.folder.mkdir(parents=True, exist_ok=True)
        words, since, asked = [*trial.words, "--base-figures", str(self.folder)], time.monotonic(), False
        log, metrics = trial.folder / LOG, trial.folder / "metrics.jsonl"
        with log.open("ab") as out, progress(str(trial)) as update:
            start = out.tell()
            child = subprocess.Popen([sys.executable, "-m", "orpo_lite.train", "--recipe", self.source, *words], stdout=out,
                                     stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL, start_new_session=True, env=of_one_card())  # fmt: skip
            while child.poll() is None:
                try:
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        child.wait(1)
                    steps = re.findall(rb'"step": (\d+)', metrics.read_bytes()) if metrics.is_file() else []
                    update(figures=[f"step {int(step)}" for step in steps[-1:]])
                    if time.monotonic() > self.end and not asked:
                        child.terminate()
                        asked = True
                except KeyboardInterrupt:
                    errors.print(f"\nstopping {trial} after its step, with a checkpoint; Ctrl-C again stops it at once")
                    child.terminate()
                    asked = self.stopped = True
        self.longest = max(self.longest, time.monotonic() - since)
        if not asked and not RunFolder(trial.folder).finished:
            lines = log.read_bytes()[start:].decode("utf-8", "replace").splitlines()
            said = (line for line in lines[::-1] if line.startswith(("error:", "failed:")))
            ended = f"ended by signal {-child.returncode}: " * (child.returncode < 0)
            trial.trouble = ended + next(said, "".join(lines[-1:]))
        return not asked or not child.returncode


# ---- the command -----------------------------------------------------------------------------------------------------


def command(
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value as in `train`; several values, separated by commas, "
        "are searched: training.learning_rate=2e-5,5e-5,1e-4 orpo.beta=0.05,0.1")] = None,
    recipe: Annotated[str | None, RECIPE_OPTION] = None,
    trials: Annotated[int | None, typer.Option(min=1, help="try so many of the combinations, chosen by Optuna")] = None,
    halving: Annotated[bool, typer.Option("--halving", help="train all briefly, the best third three times as long, and so "
        "on up to the recipe's length")] = False,
    minutes: Annotated[float | None, typer.Option(help="stop after so many minutes, with a checkpoint")] = None,
    pairs: Annotated[int | None, typer.Option(help="train on so many pairs at most, all trials together")] = None,
    output: Annotated[Path | None, typer.Option(help="the sweep's folder; default: outputs/NAME-sweep")] = None,
) -> None:  # fmt: skip
    """Train a recipe with several values of some fields, and say which are best on the held-out pairs."""
    if recipe is None:
        raise RequestError("found no --recipe: name a shipped recipe (`orpo-lite recipes` lists them), or a YAML file")
    space = searched(overrides or [])
    words = [word for word in overrides or [] if word.partition("=")[0] not in space]
    first, grid = Recipe.load(recipe, words), list(itertools.product(*space.values()))
    sweep = Sweep(recipe, output or Path("outputs") / f"{first.name}-sweep", minutes, pairs)

    def trial(place: int, rung: str = "", share: float = 1.0) -> Trial:
        settings = dict(zip(space, grid[place], strict=True))
        return Trial(recipe, words, settings, sweep.folder / rung / f"trial-{place + 1:02}", share)

    for one in (trial(place).recipe for place in range(len(grid))):
        check_local_files(one)
        if one.data.eval is None and (not one.data.eval_fraction or any(key.startswith("data.") for key in space)):
            raise RequestError(
                "data.eval: a sweep decides on held-out pairs, the same in all trials: name a file of them"
            )
    places = proposed(len(grid), trials) if trials and trials < len(grid) else list(range(len(grid)))
    if rank() == 0:
        asked = {"search": space, "recipe": first.model_dump(mode="json"), "halving": halving and len(places)}
        open_folder(sweep.folder, asked)
    gathered(None)  # the others wait until the folder is there
    console.print(
        f"{counted(len(places), 'trial')} of {counted(len(grid), 'combination')}"
        f"{f', {processes()} at a time' * (processes() > 1)}, in {sweep.folder}", markup=False,
    )  # fmt: skip
    for number in (signal.SIGTERM, getattr(signal, "SIGHUP", signal.SIGTERM)):
        signal.signal(number, signal.default_int_handler)  # as Ctrl-C: the trial is stopped first
    rungs, done = math.ceil(math.log(len(places), KEEP) - 1e-9) if halving else 0, list[Trial]()
    for rung in range(rungs + 1):
        share = KEEP ** (rung - rungs)
        if halving:
            console.print(f"rung {rung + 1}: {counted(len(places), 'trial')}, {share:.0%} of the recipe's steps")
        now = sweep.run([trial(place, f"rung-{rung + 1}" if halving else "", share) for place in places])
        done = now or done
        if not now or sweep.left:
            break
        show(now)
        best, left = list[Trial](), list(now)
        while left and len(best) < math.ceil(len(places) / KEEP):
            best.append(decide(left)[0])
            left.remove(best[-1])
        places = sorted(grid.index(tuple(one.settings.values())) for one in best)
    if rank() == 0:
        report(sweep, done)


def proposed(size: int, count: int) -> list[int]:
    """Let Optuna choose some points of a grid of so many; return their places, in order."""
    try:
        import optuna
    except ImportError:
        why = '--trials: Optuna chooses which combinations to try, and is not installed: pip install "optuna>=4,<5"'
        raise RequestError(why) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.GridSampler({"place": range(size)}, seed=0))
    return sorted(study.ask().suggest_int("place", 0, size - 1) for _ in range(count))


def open_folder(folder: Path, asked: dict[str, Any]) -> None:
    """Create a sweep's folder, or go on in it.

    Raises:
        RequestError: it is in use, or holds something else; the message lists how another sweep differs.
    """
    path, other = folder / "sweep.json", "choose another --output"
    if is_locked(folder):
        raise RequestError(f"{folder}: a sweep is running in this folder: wait for it, or {other}")
    if path.is_file() and (changes := differences(json.loads(path.read_text("utf-8")), asked)):
        raise RequestError("\n  - ".join([f"{folder}: holds a sweep of other settings: {other}, or undo", *changes]))
    if not path.is_file() and folder.is_dir() and any(folder.iterdir()):
        raise RequestError(f"{folder}: holds something else than a sweep: {other}")
    folder.mkdir(parents=True, exist_ok=True)
    lock_folder(folder)
    write_atomically(path, json.dumps(asked, indent=1))


def accuracy(found: dict[str, Any]) -> str:
    """Write an evaluation's accuracy with its interval, briefly."""
    low, high = found["rewards/accuracies_interval"]
    return f"{found['rewards/accuracies']:.1%} ({low:.0%} to {high:.0%})"


def show(trials: Sequence[Trial]) -> None:
    """Print the figures of finished trials and of their base."""
    fields, styles = [key.rpartition(".")[2] for key in trials[0].settings], ["style"] * bool(trials[0].in_style)
    table = Table("trial", *fields, "held-out accuracy", *styles, "margin", "NLL", "time", box=None, padding=(0, 1))
    sides: list[tuple[Trial, When]] = [(trials[0], "before"), *((one, "after") for one in trials)]
    for one, when in sides:
        record, found = one.run.record, one.run.record.evaluation(when)
        cells = [one.folder.name[6:], *map(escape, one.settings.values())]
        rule, took = record.rule.get(when), duration(record.total_seconds or 0)
        style = [f"{rule['chosen']:.0%}" if rule else ""] * len(styles)
        margin = f"{found['logps/chosen'] - found['logps/rejected']:.3f}"  # without beta, which may be searched
        cells, took = (["base", *[""] * len(fields)], "") if when == "before" else (cells, took)
        table.add_row(*cells, accuracy(found), *style, margin, f"{found['nll_loss']:.3f}", took)
    console.print(table)


def report(sweep: Sweep, done: list[Trial]) -> None:
    """Print what decided, and write the comparison page and the winner's recipe."""
    if sweep.left:
        lines = "".join(f"\n  {trial}" for trial in sweep.left)
        console.print(f"not tried, or stopped; the same command goes on with them:{lines}", markup=False)
    if sweep.stopped:
        raise KeyboardInterrupt
    if not done:
        raise RuntimeError(f"no trial has figures to decide on; their logs are in {sweep.folder}")
    from orpo_lite.report.page import compare_page

    winner, tied = decide(done)
    console.print(f"best: {winner}", markup=False)
    if tied:
        names = ", ".join(one.folder.name for one in tied)
        console.print(
            f"tied with {names}: {len(winner.margins)} held-out pairs do not tell them apart; {TIED}", markup=False
        )
    page, best = sweep.folder / "compare.html", sweep.folder / "best.yaml"
    write_atomically(page, compare_page([trial.run for trial in done]))
    recipe = winner.recipe.model_dump(mode="json")
    del recipe["training"]["output_dir"]
    head = f"# The best of {counted(len(done), 'trial')}: held-out accuracy {accuracy(winner.run.record.evaluation('after'))}"
    write_atomically(best, f"{head}\n{yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True)}")
    console.print(
        f"{page}: curves and answers side by side\nnext:\n  {next_command('chat', winner.folder)}\n"
        f"  {next_command('train', '--recipe', best)}", soft_wrap=True, markup=False,
    )  # fmt: skip


if __name__ == "__main__":
    run_command(command)
