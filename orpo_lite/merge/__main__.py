"""`python -m orpo_lite.merge RUN_OR_ADAPTER --output DIR`: adapter and base as one plain transformers model."""

import os
import signal
import sys
from enum import StrEnum
from typing import Annotated

import typer

from orpo_lite.common.console import console, load, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import next_command
from orpo_lite.recipe.loading import ADAPTER_FOLDER, check_folder

Onto = StrEnum("Onto", ["original", "quantized"])
"""Weights to merge into: the original 16- or 32-bit ones, or the quantized ones that training used."""
Dtype = StrEnum("Dtype", ["bfloat16", "float16", "float32"])
"""Dtype of the merged weights."""
Quantization = StrEnum("Quantization", ["nf4", "fp4"])
"""What the base of a bare adapter was quantized with."""


def command(
    output: Annotated[str, typer.Option(help="folder to write; must not exist or be empty")],
    source: Annotated[str | None,
        typer.Argument(metavar="RUN_OR_ADAPTER", help="run or adapter folder, or hub id of an adapter")] = None,
    adapter: Annotated[list[str] | None,
        typer.Option(metavar="ADAPTER:WEIGHT", help="one of several to add up, with its weight (default 1); repeat it")] = None,
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="dtype of the merged weights; default: the base's own")] = None,
    onto: Annotated[Onto,
        typer.Option(help="original weights, or the quantized ones that training used (dequantized)")] = Onto.original,
    quantization: Annotated[Quantization | None,
        typer.Option(help="what the base of a bare adapter was quantized with in training")] = None,
    double_quant: Annotated[bool,
        typer.Option("--double-quant", help="with nf4 and fp4: its constants were quantized too")] = False,
    verify: Annotated[bool, typer.Option(help="compare logits with the adapter model's")] = True,
    trust_remote_code: Annotated[bool,
        typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything but the weights, and write nothing")] = False,
) -> None:  # fmt: skip
    """Merge an adapter into its base, tensor by tensor: a plain transformers model."""
    if (source is None) == (not adapter):
        found = "neither" if source is None else f"{source} and --adapter {(adapter or [''])[0]}"
        raise RequestError(
            f"found {found}, expected RUN_OR_ADAPTER, or --adapter A:0.7 --adapter B:0.3 for the sum of several"
        )
    parts = [weighted(one) for one in adapter or ()]
    for path in [source] if source else [path for path, _ in parts]:
        check_folder(path, ADAPTER_FOLDER)  # before the slow imports
    load("orpo_lite.merge.run")
    from orpo_lite.merge.run import merge

    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the unfinished folder is removed
    merge(source or parts, output, base=base, dtype=dtype, onto=onto,
          quantization=quantization, double_quant=double_quant, verify=verify, trust_remote_code=trust_remote_code,
          dry_run=dry_run)  # fmt: skip
    if not dry_run:
        export = next_command("export", output, "--output", f"{output.rstrip('/')}.gguf")
        console.print(f"next:\n  {next_command('chat', output)}\n  {export}", soft_wrap=True, markup=False)


def weighted(given: str) -> tuple[str, float]:
    """Split ADAPTER:WEIGHT; a path may hold colons of its own."""
    path, _, last = given.rpartition(":")
    try:
        return (given, 1.0) if not path or os.path.exists(given) else (path, float(last))
    except ValueError:
        return given, 1.0


if __name__ == "__main__":
    run_command(command)
