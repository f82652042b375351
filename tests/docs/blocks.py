"""Fenced blocks of README.md and the documentation's pages, and the commands in them."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import typer

from orpo_lite.__main__ import load

ROOT = Path(__file__).parents[2]
PAGES = [ROOT / "README.md", *sorted((ROOT / ".docs" / "pages").rglob("*.md"))]
FENCE = re.compile(
    r"^(?P<indent>[ ]*)(?:<!-- needs: (?P<needs>.+?) -->\n+[ ]*)?```(?P<language>[a-z]*)[^\n]*\n(?P<body>.*?)^[ ]*```[ ]*$",
    re.MULTILINE | re.DOTALL,
)
# compat.trl_orpo has TRL's parser and a test of its own
INLINE = re.compile(r"(?<!`)`((?:python -m orpo_lite\.|orpo-lite )(?!compat)[a-z][^`]+)`(?!`)")
OURS = re.compile(
    r"^(?:(?:python|accelerate launch .*?|torchrun .*?) -m orpo_lite\.|orpo-lite )(?P<name>(?!compat)[a-z][\w.-]*)(?P<words>.*)",
    re.DOTALL,
)
FIRST = "python -m orpo_lite.train --recipe quickstart"
"""What every page may take as done: it is run once, for all of them."""


@dataclass
class Block:
    """A fenced block: where it begins, what it is written in, what it needs (None: it is run)."""

    page: Path
    line: int
    language: str
    needs: str | None
    body: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT)}:{self.line}"

    @property
    def lines(self) -> list[str]:
        """The commands of a shell block, without comments, each whole."""
        joined = self.body.replace("\\\n", " ")
        parts = [part.strip() for line in joined.splitlines() for part in line.split("&&")]
        return [shlex.join(shlex.split(part, comments=True)) for part in parts if shlex.split(part, comments=True)]


def blocks(page: Path) -> list[Block]:
    text = page.read_text("utf-8")
    return [
        Block(page, text.count("\n", 0, m.start()) + 1, m["language"], m["needs"], m["body"])
        for m in FENCE.finditer(text)
    ]


def inline(page: Path) -> list[str]:
    """Commands of ours in running text."""
    return [" ".join(found.split()) for found in INLINE.findall(FENCE.sub("", page.read_text("utf-8")))]


def words_of(line: str) -> tuple[str, list[str]] | None:
    """The command of ours and its arguments, or None where the line is somebody else's."""
    match = OURS.match(line)
    return (match["name"], shlex.split(match["words"])) if match else None


def parser(name: str) -> Any:
    """The real command, to parse arguments with and to ask for its options."""
    function = load(name)
    app = typer.Typer(add_completion=False)
    app.command(context_settings={"help_option_names": ["-h", "--help"]})(function)
    return typer.main.get_command(app)
