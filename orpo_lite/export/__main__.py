"""`python -m orpo_lite.export RUN_OR_DIR --output FILE.gguf`: a file for llama.cpp, Ollama and LM Studio."""

from typing import Annotated

import typer

from orpo_lite.common.console import load, run_command
from orpo_lite.recipe.loading import FINISHED_FOLDER, check_folder


def command(
    source: Annotated[str, typer.Argument(metavar="RUN_OR_DIR", help="run, adapter or model folder")],
    output: Annotated[str, typer.Option(help="GGUF file to write; must not exist")],
    quant: Annotated[str, typer.Option(help="f32, f16, bf16, q8_0, tq1_0, tq2_0, q2_k to q6_k (q4_k_m, q5_k_m), "
        "q5_1, q5_0, q4_1, q4_0; auto: 16 bits, bf16 where the weights are")] = "auto",
    adapter: Annotated[bool, typer.Option("--adapter", help="the adapter alone, as a LoRA file")] = False,
    ollama: Annotated[bool, typer.Option("--ollama", help="write a Modelfile beside it")] = False,
    llama_quantize: Annotated[str | None, typer.Option(metavar="PATH", help="default: on the PATH")] = None,
    base: Annotated[str | None, typer.Option(help="hub id or folder of another base to merge into")] = None,
    trust_remote_code: Annotated[bool,
        typer.Option("--trust-remote-code", help="run Python code that the base's repository ships")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything but the weights, and write nothing")] = False,
) -> None:  # fmt: skip
    """Write a model as GGUF, for llama.cpp, Ollama and LM Studio."""
    check_folder(source, FINISHED_FOLDER, on_hub=False)  # before the slow imports
    load("orpo_lite.export.gguf")
    from orpo_lite.export.gguf import export

    export(source, output, quant=quant, adapter=adapter, ollama=ollama, llama_quantize=llama_quantize, base=base,
           trust_remote_code=trust_remote_code, dry_run=dry_run)  # fmt: skip


if __name__ == "__main__":
    run_command(command)
