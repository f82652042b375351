"""Write the command that evaluates a model or adapter with lm-evaluation-harness (lm_eval 0.4), as it was trained."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

from orpo_lite.common.errors import RequestError
from orpo_lite.evaluate.loading import ModelSource
from orpo_lite.model.untrusted_files import read_object
from orpo_lite.recipe import ModelSection
from orpo_lite.recipe.loading import resolve_path

INSTALL = "pip install 'lm_eval[hf,ifeval]'"


def lm_eval_commands(source: ModelSource, tasks: str) -> dict[str, Any]:
    """Write the commands for a run, adapter or model and for its base where there is one, with notes on them.

    Args:
        tasks: names as `lm_eval ls tasks` lists them, separated by commas.

    Returns:
        {"install": ..., "commands": [...], "base": [...], "notes": [...]}; commands are run one after the other.

    Raises:
        RequestError: no task.
    """
    if not re.fullmatch(r"[\w.\-/*]+(,[\w.\-/*]+)*", tasks):
        raise RequestError(
            f"--lm-eval: found {tasks[:100]!r}, expected names of tasks separated by commas, such as ifeval,gsm8k"
        )
    adapter, notes = source.kind == "adapter", []
    base = source.model if adapter else source.base
    if not adapter:
        commands = [command(model_args(source, source.model), tasks, source)]
    elif notes := reasons_to_merge(source):
        quantized = source.model.quantization != "none"
        # not the folder that train suggests, which is merged onto the original weights
        merged = f"{Path(source.path).absolute()}-merged" + ("-quantized" if quantized else "")
        merge = ["python", "-m", "orpo_lite.merge", source.path, "--output", merged]
        if quantized:
            merge += ["--onto", "quantized"]
        whole = source.model.model_copy(update={"name_or_path": merged, "revision": None, "gguf_file": None})
        commands = [shlex.join(merge), command(model_args(source, whole), tasks, source)]
    else:
        commands = [command(model_args(source, source.model) | {"peft": absolute(source.path)}, tasks, source)]
    bases = [command(model_args(source, base), tasks, source, "-base")] if base else []
    return {"install": INSTALL, "commands": commands, "base": bases, "notes": notes}


def reasons_to_merge(source: ModelSource) -> list[str]:
    """List why lm_eval cannot apply an adapter to its base as it was trained; empty where it can."""
    config, reasons = read_object(Path(source.path) / "adapter_config.json"), []
    if source.model.quantization != "none":
        reasons.append(
            "lm_eval passes load_in_4bit and load_in_8bit on to transformers, which no longer accepts them since version 5: "
            "merged onto the quantized weights, the model answers as in training. The base below is not quantized"
        )
    targets = config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    whole = {*map(str, config.get("modules_to_save") or [])} | {t for t in targets if re.search("embed|lm_head|wte", t)}
    if whole:
        reasons.append(
            f"the adapter holds {', '.join(sorted(whole))}, and lm_eval resizes the embeddings to the tokenizer before it "
            "applies an adapter: in a merged model nothing is cut"
        )
    if source.model.gguf_file:
        reasons.append("the base is a GGUF file, to which lm_eval applies no adapter")
    return reasons


def model_args(source: ModelSource, spec: ModelSection) -> dict[str, Any]:
    """Name a whole model, with the run's tokenizer if it has its own, whose template the base may lack."""
    args: dict[str, Any] = {"pretrained": absolute(spec.name_or_path)}
    if spec.revision:
        args["revision"] = spec.revision
    if spec.gguf_file:
        args["gguf_file"] = spec.gguf_file
    args["dtype"] = str(source.facts.get("base_model", {}).get("dtype") or "auto")
    if spec.trust_remote_code:
        args["trust_remote_code"] = True
    if source.kind != "model" and (Path(source.path) / "tokenizer_config.json").is_file():
        args["tokenizer"] = absolute(source.path)
    return args


def command(args: dict[str, Any], tasks: str, source: ModelSource, suffix: str = "") -> str:
    """Write one lm_eval command; its results go into the model's folder, under a name with the suffix."""
    words = ["lm_eval", "run", "--model", "hf", "--tasks", tasks, "--batch_size", "auto"]
    if uses_template(source):
        words.append("--apply_chat_template")
        options = dict(source.recipe.data.template_kwargs) if source.recipe else {}
        if options:
            args = args | {"chat_template_args": options}
        if options.get("enable_thinking"):
            args = args | {"enable_thinking": True, "think_end_token": "</think>"}
    plain = all(not isinstance(value, dict) and "," not in str(value) for value in args.values())
    given = ",".join(f"{key}={value}" for key, value in args.items()) if plain else json.dumps(args)
    folder = Path(source.path).absolute() if Path(source.path).is_dir() else Path(source.path.replace("/", "-"))
    return shlex.join([*words, "--model_args", given, "--output_path", str(folder / f"lm_eval{suffix}")])


def uses_template(source: ModelSource) -> bool:
    """Check that prompts go through a chat template: there is one, and the training rows were not plain strings."""
    shapes = source.row_shapes
    if shapes and all("strings" in shape and "UltraFeedback" not in shape for shape in shapes):
        return bool(source.recipe and source.recipe.data.apply_template)
    folder = Path(source.path)
    if (folder / "tokenizer_config.json").is_file():
        config = read_object(folder / "tokenizer_config.json")
        return (folder / "chat_template.jinja").is_file() or bool(config.get("chat_template"))
    return True


def absolute(name: str) -> str:
    """Return the absolute path of a folder, so that the command runs anywhere; a hub id as it is."""
    folder = Path(resolve_path(name)).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name
