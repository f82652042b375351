"""The command that evaluates a model or adapter with lm-evaluation-harness (lm_eval 0.4), as it was trained."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.model_source import Found
from orpo_lite.model.untrusted_files import read_object
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import resolve_path

INSTALL = "pip install 'lm_eval[hf,ifeval]'"


def hand_off(found: Found, tasks: str) -> dict[str, Any]:
    """Commands for a run, adapter or model, for its base where there is one, and what to know of them.

    Args:
        tasks: names as `lm_eval ls tasks` lists them, with commas.

    Returns:
        {"install": ..., "commands": [...], "base": [...], "notes": [...]}; commands are run one after the other.

    Raises:
        RequestError: no task, or a base that the harness cannot load as it was trained.
    """
    if not re.fullmatch(r"[\w.\-/*]+(,[\w.\-/*]+)*", tasks):
        raise RequestError(
            f"--lm-eval: found {tasks[:100]!r}, expected names of tasks with commas, such as ifeval,gsm8k"
        )
    if found.kind != "adapter":
        base = [] if found.base is None else [line(of_model(found.base, found), tasks, found, "base")]
        return result([line(of_model(found.model, found), tasks, found)], base, [])
    merged = str(Path(found.path).absolute()) + "-merged"
    spec, quantised = found.model, found.model.quantization != "none"
    if spec.gguf_file:
        raise RequestError(
            f"--lm-eval: the base of {found.path} is a GGUF file, on which lm_eval puts no adapter: merge first (python -m "
            f"orpo_lite.merge {shlex.quote(found.path)} --output {shlex.quote(merged)}), then give that folder"
        )
    held = read_object(Path(found.path) / "adapter_config.json")
    whole: list[str] = sorted({*map(str, held.get("modules_to_save") or []), *embeddings(held)})
    notes, base = [], [line(of_model(spec, found, with_tokenizer=True), tasks, found, "base")]
    if not quantised and not whole:
        return result([line(of_adapter(found), tasks, found)], base, notes)
    onto = " --onto quantized" if quantised else ""
    if quantised:
        merged += "-quantized"  # beside the one that train's last line tells of, which goes onto the original
    first = f"python -m orpo_lite.merge {shlex.quote(found.path)} --output {shlex.quote(merged)}{onto}"
    model = {"pretrained": merged, "dtype": dtype(found)} | trust(spec)
    if quantised:
        notes.append(
            "lm_eval passes load_in_4bit and load_in_8bit on to transformers, which no longer takes them since version 5: "
            "merged onto the quantised weights, the model gives the answers of training. The base below is the one that is "
            "not quantised"
        )
    if whole:
        notes.append(
            f"the adapter holds {', '.join(whole)}, and lm_eval cuts the embeddings to the tokenizer's size before it puts an "
            "adapter on: merged, nothing is cut"
        )
    elif quantised:
        older = line(of_adapter(found) | in_bits(spec, dtype(found)), tasks, found)
        notes.append(f"where lm_eval is installed beside transformers 4, without a merge: {older}")
    return result([first, line(model, tasks, found)], base, notes)


def result(commands: list[str], base: list[str], notes: list[str]) -> dict[str, Any]:
    return {"install": INSTALL, "commands": commands, "base": base, "notes": notes}


def of_model(spec: ModelSection, found: Found, with_tokenizer: bool = False) -> dict[str, Any]:
    """Arguments of a whole model; with the run's tokenizer, whose template the base may lack."""
    args: dict[str, Any] = {"pretrained": place(spec.name_or_path)}
    if with_tokenizer and (Path(found.path) / "tokenizer_config.json").is_file():
        args["tokenizer"] = place(found.path)
    if spec.revision:
        args["revision"] = spec.revision
    return args | {"dtype": dtype(found)} | trust(spec)


def of_adapter(found: Found) -> dict[str, Any]:
    """Arguments of an adapter on its base."""
    args = of_model(found.model, found, with_tokenizer=True)
    return {"pretrained": args.pop("pretrained"), "peft": place(found.path), **args}


def in_bits(spec: ModelSection, computing: str) -> dict[str, Any]:
    """The base's quantisation, by the names that transformers 4 took."""
    if spec.quantization == "int8":
        return {"load_in_8bit": True}
    return {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": spec.quantization,
        "bnb_4bit_use_double_quant": spec.double_quant,
        "bnb_4bit_compute_dtype": computing if computing != "auto" else "bfloat16",
    }


def line(args: dict[str, Any], tasks: str, found: Found, side: str = "") -> str:
    """One lm_eval command."""
    options = dict(found.recipe.data.template_kwargs) if found.recipe else {}
    chat = templated(found)
    if chat and options:
        args = args | {"chat_template_args": options}
    if chat and options.get("enable_thinking"):
        args = args | {"enable_thinking": True, "think_end_token": "</think>"}
    plain = all(not isinstance(value, dict) and "," not in str(value) for value in args.values())
    given = ",".join(f"{key}={value}" for key, value in args.items()) if plain else json.dumps(args)
    folder = Path(found.path).absolute() if Path(found.path).is_dir() else Path(found.path.replace("/", "-"))
    words = ["lm_eval", "run", "--model", "hf", "--model_args", given, "--tasks", tasks, "--batch_size", "auto"]
    words += ["--apply_chat_template"] if chat else []
    words += ["--output_path", str(folder / f"lm_eval{'-' * bool(side)}{side}")]
    return shlex.join(words)


def templated(found: Found) -> bool:
    """Whether prompts go through a chat template: there is one, and rows of training were no plain strings."""
    folder = Path(found.path)
    shapes = {one.get("shape", "") for one in found.facts.get("data", {}).get("sources", {}).values()}
    if shapes and all("strings" in shape and "UltraFeedback" not in shape for shape in shapes):
        return bool(found.recipe and found.recipe.data.apply_template)
    if (folder / "tokenizer_config.json").is_file():
        held = read_object(folder / "tokenizer_config.json")
        return (folder / "chat_template.jinja").is_file() or bool(held.get("chat_template"))
    return True


def embeddings(config: dict[str, Any]) -> set[str]:
    """Embeddings or output head among an adapter's targets."""
    targets = config.get("target_modules") or []
    return {
        name for name in ([targets] if isinstance(targets, str) else targets) if re.search("embed|lm_head|wte", name)
    }


def dtype(found: Found) -> str:
    """What the run computed in."""
    return str(found.facts.get("base_model", {}).get("dtype") or "auto")


def trust(spec: ModelSection) -> dict[str, Any]:
    return {"trust_remote_code": True} if spec.trust_remote_code else {}


def place(name: str) -> str:
    """An absolute path of a folder, so that the command runs anywhere; a hub id as it is."""
    folder = Path(resolve_path(name)).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name
