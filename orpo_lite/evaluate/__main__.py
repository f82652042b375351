"""`python -m orpo_lite.evaluate RUN`: held-out pairs, answers to prompts and who wins, or a hand-off."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from orpo_lite.common.console import console, errors, json_alone
from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.held_out import share, show_sides

GROUPS = {"prompt_tokens": "prompt, in tokens", "longer_answer": "answers, in tokens", "source": "source"}
MOST = 12
"""Sources that are shown."""


def command(
    run: Annotated[str, typer.Argument(help="run folder, adapter folder, or folder of a whole model")],
    data: Annotated[
        str | None, typer.Option(help="other pairs than the recipe's held-out ones: file or hub id")
    ] = None,
    prompts: Annotated[
        str | None,
        typer.Option(metavar="FILE", help="answer these prompts instead: rows with turns or prompt, or lines of .txt"),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="with --prompts: write answers there row by row, and go on with it"),
    ] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of an answer at most")] = 512,
    temperature: Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time")] = 0.0,
    top_p: Annotated[float, typer.Option("--top-p", min=0, max=1, help="draw from the most likely tokens")] = 1.0,
    seed: Annotated[int, typer.Option(help="of the draws")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="prompts answered together")] = 8,
    judge: Annotated[
        str | None,
        typer.Option(
            metavar="MODEL|URL",
            help="with --prompts: who judges the answers, a model's folder or hub id, or an address",
        ),
    ] = None,
    judge_url: Annotated[
        str | None, typer.Option("--judge-url", metavar="URL", help="the same for an OpenAI-compatible address")
    ] = None,
    judge_model: Annotated[
        str | None, typer.Option("--judge-model", metavar="NAME", help="the judge's name at that address")
    ] = None,
    lm_eval: Annotated[
        str | None,
        typer.Option(
            "--lm-eval", metavar="TASKS", help="print the lm-evaluation-harness command for these tasks, such as ifeval"
        ),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON instead of a table")] = False,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
) -> None:
    """Compare base and adapter of a run: on held-out pairs, by their answers, or with lm-evaluation-harness."""
    if judge_url and judge:
        raise RequestError("--judge and --judge-url name two judges: leave one out")
    judge = judge or judge_url
    asked = {"--output": output, "--judge": judge, "--judge-model": judge_model}
    for option, given in asked.items():
        if given and not prompts:
            raise RequestError(f"{option} goes with --prompts FILE: name the prompts to be answered")
    if sum(given is not None for given in (data, prompts, lm_eval)) > 1:
        raise RequestError("--data, --prompts and --lm-eval are three kinds of evaluation: choose one")
    if top_p < 1 and not temperature:
        raise RequestError("--top-p has a meaning only where tokens are drawn: set --temperature too, such as 0.7")
    if lm_eval is not None:
        harness(run, lm_eval, as_json, trust_remote_code)
    elif prompts is not None:
        from orpo_lite.trainer.generate import Sampling

        sampling = Sampling(max_new_tokens, temperature, top_p)
        answers(run, prompts, sampling, seed, batch_size, output, (judge, judge_model), as_json, trust_remote_code)
    else:
        pairs(run, data, as_json, trust_remote_code)


def pairs(run: str, data: str | None, as_json: bool, trust_remote_code: bool) -> None:
    """Held-out pairs, under every side."""
    from orpo_lite.evaluate.loading import open_run

    with json_alone(as_json) as tell:
        opened = open_run(run, data, trust_remote_code)
        results = opened.measured()
        report = opened.pairs.report
        if as_json:
            tell(results | {"drops": report.as_dict()})
            return
    if report.dropped:
        console.print(str(report), markup=False)
    show_sides(results)
    show_groups(results)


def show_groups(results: dict[str, dict[str, Any]]) -> None:
    """Accuracy and margin by length and source, a column for each side."""
    from rich.markup import escape
    from rich.table import Table

    first, *_ = results.values()
    table = Table("reward accuracy by", "pairs", box=None)
    for name in results:
        table.add_column(f"{name}")
        table.add_column("margin", justify="right")
    for group, title in GROUPS.items():
        buckets = first["by"].get(group, [])
        if len(buckets) < 2:
            continue
        table.add_row(f"[dim]{title}[/]")
        for place, bucket in enumerate(buckets[:MOST]):
            cells = []
            for result in results.values():
                one = result["by"][group][place]
                cells += [share(one["accuracy"], one["interval"]), f"{one['margin']:.4f}"]
            table.add_row(f"  {escape(bucket['bucket'])}", f"{bucket['pairs']:,}", *cells)
        if len(buckets) > MOST:
            table.add_row(f"  and {len(buckets) - MOST} more: --json", f"{sum(b['pairs'] for b in buckets[MOST:]):,}")
    if table.row_count:
        console.print()
        console.print(table)


def answers(
    run: str,
    prompts: str,
    sampling: Any,
    seed: int,
    batch_size: int,
    output: Path | None,
    judge: tuple[str | None, str | None],
    as_json: bool,
    trust_remote_code: bool,
) -> None:
    """Answers of every side to a file of prompts, and what a judge says of them."""
    from orpo_lite.evaluate.answer_file import answer_questions
    from orpo_lite.evaluate.answering import open_answerer
    from orpo_lite.evaluate.endpoint import Endpoint
    from orpo_lite.evaluate.judge import TOKENS, LocalJudge, judge_answers, show_summary
    from orpo_lite.evaluate.model_source import find
    from orpo_lite.evaluate.prompts import read_questions

    who, at = judge
    found, questions = find(run, trust_remote_code), read_questions(prompts)
    if who and len(found.names) < 2:
        raise RequestError(
            f"--judge: {run} is a whole model, so there is no base whose answers its own could win over: give the run or "
            "adapter folder that it was merged from"
        )
    remote = None
    if who and who.startswith(("http://", "https://")):
        if not at:
            raise RequestError(f"--judge: name the model at {who} with --judge-model")
        remote = Endpoint(who, at, TOKENS)
    elif at:
        raise RequestError("--judge-model names a model at an address: give the address with --judge-url")
    elif who:
        find(who, trust_remote_code)  # before the answers are made

    def say(text: str) -> None:
        errors.print(text, soft_wrap=True, markup=False)

    def open_judge() -> Any:
        return remote or LocalJudge(open_answerer(who or "", trust_remote_code, None, say), str(who))

    with json_alone(as_json) as tell:
        rows = answer_questions(
            lambda: open_answerer(run, trust_remote_code, None, say),
            found,
            questions,
            sampling,
            seed,
            batch_size,
            output,
        )
        summary = None
        if who:
            gc.collect()  # the models that answered
            verdicts = output.with_name(f"{output.stem}.verdicts.jsonl") if output else None
            names = (found.names[0], found.names[1])
            summary = judge_answers(open_judge, str(remote or who), rows, names, verdicts)
        if as_json:
            tell({"answers": rows, "judged": summary})
            return
    if summary:
        show_summary(summary, (found.names[0], found.names[1]))
    else:
        show_answers(rows, found.names)
    if output:
        console.print(f"{len(rows)} rows in {output}", soft_wrap=True, markup=False)


def show_answers(rows: list[dict[str, Any]], names: tuple[str, ...], most: int = 4) -> None:
    """The first few questions with their answers, and how long the answers are."""
    for row in rows[:most]:
        asked = [str(row["prompt"][-1]["content"]), *row["turns"]]
        for turn, question in enumerate(asked):
            console.print(f"\n{question[:300]}", style="dim", markup=False)
            for name in names:
                text = row["answers"][name][turn]
                console.print(f"  {name}: ", style="bold", end="")
                console.print("(no room left)" if text is None else text[:600], markup=False)
    console.print()
    for name in names:
        tokens = [count for row in rows for count in row["tokens"][name] if count is not None]
        ended = [end for row in rows for end in row["ended"][name] if end is not None]
        console.print(
            f"{name}: {len(tokens)} answers of {sum(tokens) / max(1, len(tokens)):.0f} tokens on average, {ended.count(False)} "
            "cut at --max-new-tokens"
        )


def harness(run: str, tasks: str, as_json: bool, trust_remote_code: bool) -> None:
    """The lm_eval command."""
    from orpo_lite.evaluate.lm_eval import hand_off
    from orpo_lite.evaluate.model_source import find

    made = hand_off(find(run, trust_remote_code), tasks)
    if as_json:
        print(json.dumps(made, indent=1))
        return
    for text in (f"# {made['install']}", *made["commands"]):
        console.print(text, soft_wrap=True, markup=False)
    if made["base"]:
        for text in ("# the base, to compare with", *made["base"]):
            console.print(text, soft_wrap=True, markup=False)
    for note in made["notes"]:
        console.print(f"# {note}", soft_wrap=True, markup=False)
