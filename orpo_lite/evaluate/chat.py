"""`python -m orpo_lite.chat RUN`: talk to what was trained; with --compare choose between base and adapter."""

from __future__ import annotations

import random
import sys
from typing import Annotated

import typer

from orpo_lite.common.console import console, errors
from orpo_lite.common.errors import RequestError

FILE = "preferences.jsonl"


def command(
    run: Annotated[str, typer.Argument(help="run folder, adapter folder, or folder of a whole model")],
    prompt: Annotated[str | None, typer.Option(help="answer this and end; standard input does as well")] = None,
    system: Annotated[str | None, typer.Option(help="system turn; default: what the chat template writes")] = None,
    temperature: Annotated[
        float, typer.Option(min=0, help="0 takes the most likely token each time; above, tokens are drawn")
    ] = 0.0,
    top_p: Annotated[
        float,
        typer.Option("--top-p", min=0, max=1, help="draw from the most likely tokens of this probability together"),
    ] = 1.0,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", min=1, help="tokens of an answer at most")] = 512,
    seed: Annotated[int | None, typer.Option(help="of the draws, so that they come again")] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="answer with base and adapter, and keep which one you like better")
    ] = False,
    blind: Annotated[
        bool, typer.Option("--blind", help="with --compare: shuffled, without saying which is which before you chose")
    ] = False,
    preferences: Annotated[
        str, typer.Option(metavar="FILE", help="with --compare: where choices are appended, as training data")
    ] = FILE,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
) -> None:
    """Talk to a trained model in the terminal, or compare it with its base."""
    if (blind or preferences != FILE) and not compare:
        raise RequestError(f"{'--blind' if blind else '--preferences'} goes with --compare: add it, or leave this out")
    if top_p < 1 and not temperature:
        raise RequestError("--top-p has a meaning only where tokens are drawn: set --temperature too, such as 0.7")
    interactive = prompt is None and sys.stdin.isatty()
    if prompt is None and not interactive:
        prompt = sys.stdin.read().strip()
    if prompt is not None and not prompt.strip():
        raise RequestError("found an empty prompt: write it after --prompt, or pipe it in")

    import torch

    from orpo_lite.evaluate.answering import Sampling, open_answerer
    from orpo_lite.evaluate.chat_compare import Comparison
    from orpo_lite.evaluate.chat_loop import Chat
    from orpo_lite.evaluate.chat_preferences import PreferenceFile

    kept = PreferenceFile(preferences) if compare and interactive else None
    say = console if interactive else errors
    answerer = open_answerer(
        run,
        trust_remote_code,
        "--compare" if compare else None,
        lambda line: say.print(line, soft_wrap=True, markup=False),
    )
    torch.manual_seed(seed if seed is not None else random.SystemRandom().randrange(2**32))
    sampling = Sampling(max_new_tokens, temperature, top_p)
    comparison = Comparison(answerer, kept, blind, random.Random(seed)) if compare else None
    chat = Chat(answerer, sampling, system, comparison)
    if interactive:
        chat.run()
    else:
        assert prompt is not None
        chat.once(prompt)
