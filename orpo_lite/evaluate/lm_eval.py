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
        RequestError: no task, or a base that the harness cannot load as it was trained.
    """
    if not re.fullmatch(r"[\w.\-/*]+(,[\w.\-/*]+)*", tasks):
        raise RequestError(
            f"--lm-eval: found {tasks[:100]!r}, expected names of tasks separated by commas, such as ifeval,gsm8k"
        )
    found: dict[str, Any] = {"install": INSTALL, "commands": [], "base": [], "notes": []}
    if source.kind != "adapter":
        found["commands"] = [command(model_args(source.model, source), tasks, source)]
        if source.base is not None:
            found["base"] = [command(model_args(source.base, source), tasks, source, "base")]
        return found
    merged = str(Path(source.path).absolute()) + "-merged"
    spec, quantized = source.model, source.model.quantization != "none"
    if spec.gguf_file:
        raise RequestError(
            f"--lm-eval: the base of {source.path} is a GGUF file, to which lm_eval applies no adapter: merge first (python -m "
            f"orpo_lite.merge {shlex.quote(source.path)} --output {shlex.quote(merged)}), then give that folder"
        )
    config = read_object(Path(source.path) / "adapter_config.json")
    trained_whole: list[str] = sorted({*map(str, config.get("modules_to_save") or []), *embeddings(config)})
    found["base"] = [command(base_args(source), tasks, source, "base")]
    if not quantized and not trained_whole:
        found["commands"] = [command(adapter_args(source), tasks, source)]
        return found
    if quantized:
        merged += "-quantized"  # beside the folder that train suggests, which is merged onto the original weights
    merge = ["python", "-m", "orpo_lite.merge", source.path, "--output", merged]
    merge += ["--onto", "quantized"] if quantized else []
    model = {"pretrained": merged, "dtype": dtype(source)} | trust(spec)
    found["commands"] = [shlex.join(merge), command(model, tasks, source)]
    if quantized:
        found["notes"].append(
            "lm_eval passes load_in_4bit and load_in_8bit on to transformers, which no longer accepts them since version 5: "
            "merged onto the quantized weights, the model answers as in training. The base below is not quantized"
        )
    if trained_whole:
        found["notes"].append(
            f"the adapter holds {', '.join(trained_whole)}, and lm_eval resizes the embeddings to the tokenizer before it "
            "applies an adapter: in a merged model nothing is cut"
        )
    return found


def model_args(spec: ModelSection, source: ModelSource) -> dict[str, Any]:
    """Name a whole model."""
    revision = {"revision": spec.revision} if spec.revision else {}
    return {"pretrained": absolute(spec.name_or_path), **revision, "dtype": dtype(source), **trust(spec)}


def base_args(source: ModelSource) -> dict[str, Any]:
    """Name the base of an adapter, with the run's tokenizer, whose template the base may lack."""
    own = (Path(source.path) / "tokenizer_config.json").is_file()
    return model_args(source.model, source) | ({"tokenizer": absolute(source.path)} if own else {})


def adapter_args(source: ModelSource) -> dict[str, Any]:
    """Name an adapter and its base."""
    return base_args(source) | {"peft": absolute(source.path)}


def command(args: dict[str, Any], tasks: str, source: ModelSource, side: str = "") -> str:
    """Write one lm_eval command."""
    options = dict(source.recipe.data.template_kwargs) if source.recipe else {}
    chat = uses_template(source)
    if chat and options:
        args = args | {"chat_template_args": options}
    if chat and options.get("enable_thinking"):
        args = args | {"enable_thinking": True, "think_end_token": "</think>"}
    plain = all(not isinstance(value, dict) and "," not in str(value) for value in args.values())
    given = ",".join(f"{key}={value}" for key, value in args.items()) if plain else json.dumps(args)
    folder = Path(source.path).absolute() if Path(source.path).is_dir() else Path(source.path.replace("/", "-"))
    words = ["lm_eval", "run", "--model", "hf", "--model_args", given, "--tasks", tasks, "--batch_size", "auto"]
    words += ["--apply_chat_template"] if chat else []
    words += ["--output_path", str(folder / f"lm_eval{'-' * bool(side)}{side}")]
    return shlex.join(words)


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


def embeddings(config: dict[str, Any]) -> set[str]:
    """List the embeddings and the output head among an adapter's targets."""
    targets = config.get("target_modules") or []
    targets = [targets] if isinstance(targets, str) else targets
    return {name for name in targets if re.search("embed|lm_head|wte", name)}


def dtype(source: ModelSource) -> str:
    """Return the dtype that the run computed in."""
    return str(source.facts.get("base_model", {}).get("dtype") or "auto")


def trust(spec: ModelSection) -> dict[str, Any]:
    """Pass trust_remote_code on where it is set."""
    return {"trust_remote_code": True} if spec.trust_remote_code else {}


def absolute(name: str) -> str:
    """Return the absolute path of a folder, so that the command runs anywhere; a hub id as it is."""
    folder = Path(resolve_path(name)).expanduser()
    return str(folder.absolute()) if folder.is_dir() else name
