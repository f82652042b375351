"""`python -m orpo_lite.merge RUN_OR_ADAPTER --output DIR`: adapter and base as one plain transformers model."""

from __future__ import annotations

import signal
import sys
from enum import StrEnum
from typing import Annotated, Any

import typer

from orpo_lite.common.console import console, json_alone, run_command

Onto = StrEnum("Onto", ["original", "quantized"])
"""Weights to merge into: the original 16- or 32-bit ones, or the quantized ones that training used."""
Dtype = StrEnum("Dtype", ["bfloat16", "float16", "float32"])
"""Dtype of the merged weights."""


def command(
    source: Annotated[
        str, typer.Argument(metavar="RUN_OR_ADAPTER", help="run or adapter folder, or hub id of an adapter")
    ],
    output: Annotated[str, typer.Option(help="folder to write; must not exist or be empty")],
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged weights; default: the base's own")] = None,
    onto: Annotated[
        Onto, typer.Option(help="original weights, or the quantized ones that training used (dequantized)")
    ] = Onto.original,
    verify: Annotated[
        bool | None,
        typer.Option("--verify/--no-verify", help="compare logits with the adapter model's; default: if it fits"),
    ] = None,
    trust_remote_code: Annotated[
        bool, typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")
    ] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Merge an adapter into its base, tensor by tensor: a plain transformers model."""
    from orpo_lite.merge.run import merge

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished folder is removed
    facts: dict[str, Any] = {}
    with json_alone(as_json) as print_json:
        merge(source, output, base=base, dtype=dtype, onto=onto, verify=verify,
              trust_remote_code=trust_remote_code, facts=facts)  # fmt: skip
        if as_json:
            return print_json(facts)
    console.print(f"next: python -m orpo_lite.chat {output}", soft_wrap=True, markup=False)


if __name__ == "__main__":
    run_command(command)
