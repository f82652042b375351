"""`python -m orpo_lite.evaluate RUN`: held-out pairs, or answers to prompts and who wins."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from orpo_lite.common.console import console, json_alone, load, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import counted
from orpo_lite.evaluate.held_out import show, too_few
from orpo_lite.recipe.loading import ADDRESS, MODEL_FOLDER, check_folder

if TYPE_CHECKING:
    from orpo_lite.evaluate.answering import Side


Run = Annotated[str, typer.Argument(help="run folder, adapter folder, or folder of a whole model")]
Against = Annotated[
    str | None, typer.Option(metavar="RUN", help="compare with this run, adapter or model instead of the base")
]
Base = Annotated[str | None, typer.Option(help="hub id or folder of another base for the adapter of RUN")]
MaxNewTokens = Annotated[int, typer.Option("--max-new-tokens", min=1, help="longest answer, in tokens")]
Temperature = Annotated[float, typer.Option(min=0, help="0 takes the most likely token each time")]
TopP = Annotated[float, typer.Option("--top-p", min=0, max=1, help="sample from the most likely tokens")]
JudgeModel = Annotated[
    str | None, typer.Option("--judge-model", metavar="NAME", help="the judge's name at that address")
]
JudgeMaxTokens = Annotated[
    int, typer.Option("--judge-max-tokens", min=16, help="longest reply of the judge; one that thinks needs more")
]
TrustRemoteCode = Annotated[
    bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
]


def command(
    run: Run,
    against: Against = None,
    base: Base = None,
    data: Annotated[str | None, typer.Option(help="other pairs than the recipe's held-out ones: file or hub id")] = None,
    prompts: Annotated[str | None,
        typer.Option(metavar="FILE", help="answer these prompts instead: rows, or lines of .txt")] = None,
    output: Annotated[Path | None,
        typer.Option(metavar="FILE", help="with --prompts: write answers there, and resume from it")] = None,
    max_new_tokens: MaxNewTokens = 512,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Annotated[int, typer.Option(help="of the sampling")] = 0,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="prompts answered together")] = 8,
    judge: Annotated[str | None, typer.Option(metavar="MODEL|URL", help="with --prompts: let a model or an "
        "OpenAI-compatible address judge the answers")] = None,
    judge_model: JudgeModel = None,
    judge_max_tokens: JudgeMaxTokens = 1024,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, with accuracy by length and source")] = False,
    trust_remote_code: TrustRemoteCode = False,
) -> None:  # fmt: skip
    """Compare base and adapter of a run, or two runs: on held-out pairs, or by their answers."""
    for option, given in {"--output": output, "--judge": judge, "--judge-model": judge_model}.items():
        if given and not prompts:
            raise RequestError(f"{option} goes with --prompts FILE: name the prompts to answer")
    check_judge(judge, judge_model)
    if data is not None and prompts is not None:
        raise RequestError("--data and --prompts are two kinds of evaluation: choose one")
    for path in filter(None, (run, against)):
        check_folder(path, MODEL_FOLDER)
    load("orpo_lite.evaluate.answering")
    from orpo_lite.evaluate.answering import find_sides

    if prompts is None:
        evaluate_pairs(find_sides(run, trust_remote_code, base, against), data, as_json)
        return
    from orpo_lite.evaluate.answer_file import answer_questions, read_questions
    from orpo_lite.evaluate.judge import find_judge, judge_answers, show_summary
    from orpo_lite.trainer.generate import Sampling

    sampling = Sampling(max_new_tokens, temperature, top_p)
    sides = find_sides(run, trust_remote_code, base, against, "--judge" if judge else None)
    questions = read_questions(prompts)
    names, found, summary = tuple(side.name for side in sides), None, None
    if judge:
        found = find_judge(judge, judge_model, judge_max_tokens, trust_remote_code)
    with json_alone(as_json) as print_json:
        rows = answer_questions(sides, questions, sampling, seed, batch_size, output)
        sides.clear()  # the judge needs their memory
        if found:
            verdicts = output.with_name(f"{output.stem}.verdicts.jsonl") if output else None
            summary = judge_answers(found, rows, names, verdicts)
        if as_json:
            print_json({"answers": rows, "judged": summary})
            return
    if summary:
        show_summary(summary, names)
    else:
        show_answers(rows, names)
    if output:
        console.print(f"{counted(len(rows), 'row')} in {output}", soft_wrap=True, markup=False)


def check_judge(judge: str | None, judge_model: str | None) -> None:
    """Raise RequestError for a judge whose folder does not exist, or an address without its model's name."""
    at_address = bool(judge and judge.startswith(ADDRESS))
    if judge_model and not at_address:
        raise RequestError("--judge-model names a model at an address: give the address with --judge URL")
    if at_address and not judge_model:
        raise RequestError(f"--judge: name the model at {judge} with --judge-model")
    if judge and not at_address:
        check_folder(judge, MODEL_FOLDER, field="--judge")


def evaluate_pairs(sides: list[Side], data: str | None, as_json: bool) -> None:
    """Evaluate held-out pairs under every side."""
    from orpo_lite.evaluate.loading import evaluate_sides

    asked = "\n".join(f"{side.name}: {side.source}" for side in sides)
    with json_alone(as_json) as print_json:
        results, report = evaluate_sides(sides, data)
        if as_json:
            print_json(results | {"drops": report.as_dict()})
            return
    console.print(asked, soft_wrap=True, markup=False)
    if report.dropped:
        console.print(str(report), markup=False)
    show(results)
    if warning := too_few(min(result["pairs"] for result in results.values())):
        console.print(warning, style="yellow", markup=False)


def show_answers(rows: list[dict[str, Any]], names: tuple[str, ...], count: int = 4) -> None:
    """Print the first few questions with their answers, and how long the answers are."""
    for row in rows[:count]:
        asked = [str(row["prompt"][-1]["content"]), *row["turns"]]
        for turn, question in enumerate(asked):
            console.print(f"\n{question[:300]}", style="dim", markup=False)
            for name in names:
                text = row["answers"][name][turn]
                console.print(f"  {name}: ", style="bold", end="", markup=False)
                console.print(
                    "(no room left)" if text is None else text[:600].strip() or "(ended at once)", markup=False
                )
    console.print()
    for name in names:
        tokens = [count for row in rows for count in row["tokens"][name] if count is not None]
        cut = sum(ended is False for row in rows for ended in row["ended"][name])
        console.print(
            f"{name}: {counted(len(tokens), 'answer')} of {sum(tokens) / max(1, len(tokens)):.0f} tokens on average, {cut} cut at "
            "--max-new-tokens",
            markup=False,
        )


if __name__ == "__main__":
    run_command(command)
