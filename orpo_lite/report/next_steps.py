"""What to type next, for the run at hand."""

from __future__ import annotations

import json
import shlex
from html import escape
from pathlib import Path

from orpo_lite.report.run_record import Told


def lines(run: Told) -> list[tuple[str, str]]:
    """Commands for this run, and what each is for."""
    assert run.path is not None
    here = shown_path(run.path)
    place, name = shlex.quote(here), run.path.resolve().name
    if run.state != "finished":
        why = f"go on from {run.checkpoint}" if run.checkpoint else "begin again: there is no checkpoint"
        resume = " --resume" if run.checkpoint else ""
        return [
            (f"python -m orpo_lite.train --recipe {place}{resume}", why),
            (f"python -m orpo_lite.report {place}", "this page again, as far as the run has come by then"),
        ]
    whole = run.recipe.get("adapter", "not known") is None
    found = []
    if not whole:
        found += [(f"python -m orpo_lite.evaluate {place}", "base against adapter, on these or other pairs (--data)")]
    found += [(f"python -m orpo_lite.chat {place}" + ("" if whole else " --compare"), "talk to it")]
    if not whole:
        merged = shlex.quote(f"{here}-merged")
        found += [(f"python -m orpo_lite.merge {place} --output {merged}", "a plain transformers model")]
    if not encoder_decoder(run.path):
        gguf = shlex.quote(f"{name}.gguf")
        found += [
            (f"python -m orpo_lite.export {place} --output {gguf} --quant q8_0 --ollama", "for llama.cpp and Ollama")
        ]
    seed = run.facts.get("seed")
    again = f"training.seed={int(seed) + 1 if isinstance(seed, int) else 1}"
    return [
        *found,
        (f"python -m orpo_lite.push {place} --repo USER/{shlex.quote(name)} --dry-run", "what would go to the hub"),
        (f"python -m orpo_lite.train --recipe {place} {again}", "again with another seed, in a new folder"),
        (f"python -m orpo_lite.report {place} {shlex.quote(f'{here}-2')}", "then both over one another"),
    ]


def block(run: Told) -> str:
    """The commands as HTML."""
    text = "\n".join(f"<span class=dim># {escape(why)}</span>\n{escape(line)}" for line, why in lines(run))
    return f"<pre class=code tabindex=0 role=group aria-label=Commands>{text}</pre>"


def encoder_decoder(folder: Path) -> bool:
    """Whether the configuration beside the weights says so; GGUF holds decoders only."""
    for name, key, said in (
        ("adapter_config.json", "task_type", "SEQ_2_SEQ_LM"),
        ("config.json", "is_encoder_decoder", True),
    ):
        try:
            if json.loads((folder / name).read_text("utf-8")).get(key) == said:
                return True
        except (OSError, ValueError, AttributeError, RecursionError):
            continue
    return False


def shown_path(path: Path) -> str:
    """As seen from here, where it lies here: a page that is passed on need not name its author's home."""
    try:
        return str(path.resolve().relative_to(Path.cwd().resolve()))
    except ValueError:
        return str(path)
