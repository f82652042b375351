"""`python -m tests.benchmarks.merge`: time and peak memory of our merge against PEFT's, on a random Mistral-like model.

Each contestant is a process of its own, whose peak resident memory the system counts, imports included. The merged
weights are compared with PEFT's and with W + scale * B A computed in float32 and rounded once.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import MistralConfig, PreTrainedTokenizerFast

from orpo_lite.common.console import console, json_alone, run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.train.bench import ratios

PEFT_MERGE = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, output = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.bfloat16)
PeftModel.from_pretrained(model, adapter).merge_and_unload().save_pretrained(output, max_shard_size="700MB")
"""
RANK, ALPHA = 16, 32


def make_base(folder: Path, layers: int, hidden: int, shard_bytes: int = 700 * 10**6) -> int:
    """Write a random Mistral in bfloat16, in shards, one layer in memory at a time; how many parameters it has."""
    config = MistralConfig(
        hidden_size=hidden, intermediate_size=hidden * 7 // 2, num_hidden_layers=layers, num_attention_heads=hidden // 128,
        num_key_value_heads=max(1, hidden // 512), head_dim=128, dtype="bfloat16",
    )  # fmt: skip
    folder.mkdir()
    config.architectures = ["MistralForCausalLM"]
    config.save_pretrained(folder)
    generator = torch.Generator().manual_seed(0)
    pending: dict[str, Tensor] = {}
    shards: list[list[str]] = []
    count = 0

    def flush() -> None:
        if pending:
            save_file(pending, folder / f"part-{len(shards)}", metadata={"format": "pt"})
            shards.append(list(pending))
            pending.clear()

    def add(name: str, *shape: int) -> None:
        nonlocal count
        count += torch.Size(shape).numel()
        pending[name] = (torch.randn(shape, generator=generator) * 0.02).to(torch.bfloat16)
        if sum(t.nbytes for t in pending.values()) > shard_bytes:
            flush()

    add("model.embed_tokens.weight", config.vocab_size, hidden)
    for layer in range(layers):
        for name, (rows, columns) in linear_shapes(config).items():
            add(f"model.layers.{layer}.{name}.weight", rows, columns)
        for name in ("input_layernorm", "post_attention_layernorm"):
            add(f"model.layers.{layer}.{name}.weight", hidden)
    add("model.norm.weight", hidden)
    add("lm_head.weight", config.vocab_size, hidden)
    flush()
    places = {}
    for number, keys in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors"
        (folder / f"part-{number - 1}").rename(folder / name)
        places |= dict.fromkeys(keys, name)
    index = {"metadata": {"total_size": count * 2}, "weight_map": places}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), "utf-8")
    words = {"</s>": 0, **{chr(97 + i): i + 1 for i in range(26)}}
    from tokenizers import Tokenizer, models, pre_tokenizers

    core = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", pad_token="a").save_pretrained(folder)
    return count


def linear_shapes(config: MistralConfig) -> dict[str, tuple[int, int]]:
    """(out, in) of the linear layers of one block."""
    hidden, inner = config.hidden_size, config.intermediate_size
    query, key = config.num_attention_heads * 128, config.num_key_value_heads * 128
    return {
        "self_attn.q_proj": (query, hidden), "self_attn.k_proj": (key, hidden), "self_attn.v_proj": (key, hidden),
        "self_attn.o_proj": (hidden, query), "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }  # fmt: skip


def make_adapter(folder: Path, base: Path) -> None:
    """A random LoRA adapter in float32 on every linear layer of the base, in PEFT's own format."""
    config = MistralConfig.from_pretrained(base)
    generator = torch.Generator().manual_seed(1)
    tensors: dict[str, Tensor] = {}
    for layer in range(config.num_hidden_layers):
        for name, (rows, columns) in linear_shapes(config).items():
            path = f"base_model.model.model.layers.{layer}.{name}"
            tensors[f"{path}.lora_A.weight"] = torch.randn(RANK, columns, generator=generator) * 0.02
            tensors[f"{path}.lora_B.weight"] = torch.randn(rows, RANK, generator=generator) * 0.02
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    modules = [name.rpartition(".")[2] for name in linear_shapes(config)]
    facts = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": RANK, "lora_alpha": ALPHA, "target_modules": modules}
    (folder / "adapter_config.json").write_text(json.dumps(facts | {"base_model_name_or_path": str(base)}), "utf-8")


def measure(words: list[str]) -> tuple[float, int]:
    """Seconds and peak resident bytes of a process."""
    start = time.perf_counter()
    with tempfile.TemporaryFile("w+") as log:
        process = subprocess.Popen(words, stdout=log, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            raise RuntimeError(f"{' '.join(words[:4])} ... failed: {log.read()[-2000:]}")
    return seconds, usage.ru_maxrss * 1024


def apart(function: Any, *arguments: Any) -> Any:
    """Call a function in a process of its own: a child's peak counts what its parent held when it was started."""
    with ProcessPoolExecutor(1, mp_context=multiprocessing.get_context("spawn")) as pool:
        return pool.submit(function, *arguments).result()


def differing(folder: Path, base: Path, adapter: Path, other: Path) -> tuple[int, int]:
    """Weights of a merged folder that are not W + scale * B A in float32 rounded once, and that are not the other's."""
    with safe_open(adapter / "adapter_model.safetensors", "pt") as factors:
        held, exact, peft = places(folder), places(base), places(other)
        wrong = unlike = 0
        for key in exact:
            found, weight = read(folder, held, key), read(base, exact, key)
            path = f"base_model.model.{key.removesuffix('.weight')}"
            if f"{path}.lora_A.weight" in factors.keys():  # noqa: SIM118  # no dict
                a, b = factors.get_tensor(f"{path}.lora_A.weight"), factors.get_tensor(f"{path}.lora_B.weight")
                weight = (weight.float() + (b @ a) * (ALPHA / RANK)).to(weight.dtype)
            wrong += int((found != weight).sum())
            unlike += int((found != read(other, peft, key)).sum())
    return wrong, unlike


def places(folder: Path) -> dict[str, str]:
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        return json.loads(index.read_text("utf-8"))["weight_map"]
    with safe_open(folder / "model.safetensors", "pt") as file:
        return dict.fromkeys(file.keys(), "model.safetensors")


def read(folder: Path, where: dict[str, str], key: str) -> Tensor:
    with safe_open(folder / where[key], "pt") as file:
        return file.get_tensor(key)


def bench(folder: Path, layers: int, hidden: int, repeats: int, verify: bool) -> dict[str, Any]:
    """Both merges in turn, after one round of each that is not counted."""
    base, adapter = folder / "base", folder / "adapter"
    parameters = apart(make_base, base, layers, hidden)
    apart(make_adapter, adapter, base)
    ours = [sys.executable, "-m", "orpo_lite.merge", str(adapter), "--output"]
    commands = {
        "ours": [*ours, str(folder / "ours"), *([] if verify else ["--no-verify"])],
        "peft": [sys.executable, "-c", PEFT_MERGE, str(base), str(adapter), str(folder / "peft")],
    }
    taken: dict[str, list[tuple[float, int]]] = {name: [] for name in commands}
    for _ in range(repeats + 1):
        for name, words in commands.items():
            shutil.rmtree(folder / name, ignore_errors=True)
            os.sync()  # what the one has left to be written is not the other's to wait for
            taken[name].append(measure(words))
    seconds = {name: [t for t, _ in each[1:]] for name, each in taken.items()}
    memory = {name: statistics.median(m for _, m in each[1:]) for name, each in taken.items()}
    wrong, unlike = apart(differing, folder / "ours", base, adapter, folder / "peft")
    return {
        "parameters": parameters,
        "seconds": seconds,
        "peak_rss_bytes": memory,
        "ours_time_share": ratios(seconds["ours"], seconds["peft"]),
        "ours_memory_share": memory["ours"] / memory["peft"],
        "weights_not_rounded_once": wrong,
        "weights_unlike_peft": unlike,
    }


def command(
    layers: Annotated[int, typer.Option(help="decoder layers")] = 30,
    hidden: Annotated[int, typer.Option(help="width, a multiple of 512")] = 2048,
    repeats: Annotated[int, typer.Option(help="timed rounds, the contestants in turn")] = 3,
    verify: Annotated[bool, typer.Option("--verify/--no-verify", help="with our check of the logits")] = True,
    folder: Annotated[
        str | None, typer.Option(help="where the models are written; default: a temporary folder")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON, and everything else to stderr")] = False,
) -> None:
    """Our merge against PEFT's merge_and_unload and save_pretrained, on a random Mistral-like model in bfloat16."""
    if hidden % 512 or hidden < 512 or layers < 1 or repeats < 1:
        raise RequestError(
            f"found --hidden {hidden} --layers {layers} --repeats {repeats}, expected a multiple of 512 and at least 1"
        )
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench-merge-") as place, json_alone(as_json) as show:
        found = bench(Path(place), layers, hidden, repeats, verify)
        if as_json:
            return show(found)
    time_share = found["ours_time_share"]
    console.print(
        f"{found['parameters'] / 1e9:.2f} B parameters in bfloat16, LoRA r={RANK} on all linear layers, {torch.get_num_threads()} threads"
    )
    for name in ("peft", "ours"):
        each = found["seconds"][name]
        console.print(
            f"  {name}: median {statistics.median(each):.1f} s ({min(each):.1f} to {max(each):.1f}), peak resident memory "
            f"{found['peak_rss_bytes'][name] / 2**30:.2f} GiB"
        )
    console.print(
        f"ours takes {time_share['median']:.2f} of PEFT's time ({time_share['min']:.2f} to {time_share['max']:.2f}) and "
        f"{found['ours_memory_share']:.2f} of its memory; weights that are not W + scale B A rounded once: "
        f"{found['weights_not_rounded_once']}, that are not PEFT's: {found['weights_unlike_peft']}"
    )


if __name__ == "__main__":
    run_command(command)
