"""TRL's examples/scripts/orpo.py by its own flags: `python -m orpo_lite.compat.trl_orpo --model_name_or_path ...`.

The parser is TRL's, over TRL's ScriptArguments and ModelConfig and our ORPOConfig, so `--config FILE` and every flag of
those work; it needs the extra `trl`. They become a recipe, which is trained like any other.
`accelerate launch -m orpo_lite.compat.trl_orpo ...` starts it on several GPUs.
"""

import importlib.util
import os
import re
import shlex
import sys
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING as PEFTS_TARGETS
from transformers import TrainingArguments
from yaml import YAMLError

from orpo_lite.common import safe_yaml
from orpo_lite.common.console import guard
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.data.sources import local_files
from orpo_lite.model.locating import read_config, renaming_field
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.train.__main__ import check_local_files, train
from orpo_lite.trainer.config import CHECKPOINTING, RENAMED, ORPOConfig
from orpo_lite.trainer.config_from_recipe import SET_BY_OTHER_SECTIONS

TRLS = {"learning_rate": 1e-6, "lr_scheduler_type": "linear", "eval_strategy": "no", "save_strategy": "steps",
        "save_total_limit": None}  # fmt: skip
"""TRL's defaults where those of a recipe are others."""
UNUSED: dict[str, str] = safe_yaml.read(Path(__file__).with_suffix(".yaml"))
"""Flags that no recipe has -> what there is instead."""


def parser() -> Any:
    """Return TRL's parser for this command.

    A flag that may be unset, such as --bf16, needs no value, and --dtype is left to the device: TRL's float32 would not
    fit a 7B model on a consumer card.
    """
    from trl import ModelConfig, ScriptArguments, TrlParser  # pyright: ignore[reportPrivateImportUsage]

    def refuse(message: str) -> NoReturn:  # without a usage of 150 flags
        raise RequestError(f"{message} (--help lists all flags)")

    made: Any = TrlParser((ScriptArguments, ORPOConfig, ModelConfig), prog="python -m orpo_lite.compat.trl_orpo")  # type: ignore[arg-type]  # dataclasses
    made.error = refuse
    made.set_defaults(dtype=None)
    for action in made._actions:
        if getattr(action.type, "__name__", "") == "string_to_bool" and action.nargs is None:
            action.nargs, action.const = "?", True
    return made


def parse(words: Sequence[str]) -> tuple[Any, ORPOConfig, Any]:
    """Parse the command line into TRL's ScriptArguments, our ORPOConfig and TRL's ModelConfig.

    Raises:
        RequestError: no such flag, a value that does not fit, a config file that cannot be read.
    """
    try:
        *parsed, rest = parser().parse_args_and_config(list(words), return_remaining_strings=True)
    except RequestError:
        raise
    except OSError as error:
        raise RequestError(f"--config: {error.filename} cannot be read: {error.strerror}") from error
    except IndexError as error:
        raise RequestError("--config: found no file name after it") from error
    except (ValueError, TypeError, YAMLError) as error:
        broken = "--config: not readable as YAML: " if isinstance(error, YAMLError) else ""
        raise RequestError(broken + " ".join(str(error).split())) from error
    if rest:
        known = [field.name for section in parsed for field in fields(section)]
        names = [word.partition("=")[0].lstrip("-").replace("-", "_") for word in rest if word.startswith("--")]
        lines = [f"no flag --{name}{nearest(name, known)}" for name in names]
        raise RequestError("; ".join(lines) or f"found {' '.join(rest)} without a flag before it")
    return tuple(parsed)


def recipe_of(script: Any, args: ORPOConfig, model: Any) -> Recipe:
    """Write TRL's flags as a recipe.

    Raises:
        RequestError: flags that do not go together, that no recipe has, or whose values do not fit.
    """
    unused = [f"--{name}: leave it out: {why}" for name, why in UNUSED.items()
              if any(getattr(part, name, None) for part in (script, args, model))]  # fmt: skip
    if unused:
        raise RequestError("; ".join(unused))
    if not model.model_name_or_path:
        raise RequestError("--model_name_or_path is missing: give a model's folder, or its id on the hub as owner/name")
    if model.load_in_4bit and not model.use_peft:
        raise RequestError("--load_in_4bit: quantized weights cannot be trained: add --use_peft, or leave it out")
    revision = None if model.model_revision == "main" else model.model_revision
    base = {"name_or_path": model.model_name_or_path, "revision": revision, "trust_remote_code": args.trust_remote_code}
    base |= {"quantization": model.bnb_4bit_quant_type if model.load_in_4bit else "none", "double_quant": model.use_bnb_nested_quant,
             "attention": model.attn_implementation or "auto",
             "dtype": model.dtype or ("float16" if args.fp16 else "auto")}  # fmt: skip
    checkpointing = getattr(args, CHECKPOINTING if RENAMED else "gradient_checkpointing")
    content = {
        "name": re.sub(r"[^\w.-]", "-", Path(args.output_dir or "trl-orpo").absolute().name, flags=re.ASCII).strip("-._"),
        "model": base,
        "adapter": adapter_of(model, base, args) if model.use_peft else None,
        "data": data_of(script, args),
        "orpo": {name: getattr(args, name) for name in
                 ("beta", "nll_scope", "nll_mean", "layout", "tokens_per_batch", "disable_dropout")},
        "training": training_of(args),
        "memory": {"kernels": args.kernels, "checkpointing": (args.checkpointed_layers or "all") if checkpointing else "none",
                   "head_chunk": args.head_chunk or "auto", "offload_activations": args.offload_activations},
        "evaluation": {"max_new_tokens": args.max_completion_length or 128},
    }  # fmt: skip
    return Recipe.parse(content, "command line")


def adapter_of(model: Any, base: dict[str, Any], args: ORPOConfig) -> dict[str, Any]:
    """Write TRL's LoRA flags as a recipe's adapter; without --lora_target_modules they are PEFT's for this kind of model."""
    if model.lora_task_type != "CAUSAL_LM":
        raise RequestError(f"--lora_task_type: found {model.lora_task_type}, expected CAUSAL_LM: ORPO trains answers")
    targets = model.lora_target_modules
    if not targets and not model.lora_target_parameters:
        kind = read_config(ModelSection(**base)).model_type
        if kind not in PEFTS_TARGETS:
            raise RequestError(
                f"--lora_target_modules is missing, and PEFT has none for {kind} models: give all-linear"
            )
        targets = sorted(PEFTS_TARGETS[kind])
    return {"r": model.lora_r, "alpha": model.lora_alpha, "dropout": model.lora_dropout, "target_modules": targets or [],
            "target_parameters": model.lora_target_parameters, "modules_to_save": model.lora_modules_to_save,
            "use_rslora": model.use_rslora, "use_dora": model.use_dora,
            "loraplus_lr_ratio": args.loraplus_lr_ratio}  # fmt: skip


def data_of(script: Any, args: ORPOConfig) -> dict[str, Any]:
    """Write the data set as a recipe's data; the held-out split is read where there are evaluations, as in TRL's script.

    Raises:
        RequestError: no data set, or the held-out split would be the training split again.
    """
    name, train_split, test_split = script.dataset_name, script.dataset_train_split, script.dataset_test_split
    if not name:
        raise RequestError("--dataset_name is missing: give a file, a folder, or a data set of the hub as owner/name")
    source = {"path": name, "name": script.dataset_config, "split": train_split}
    strategy, held_out = str(getattr(args.eval_strategy, "value", args.eval_strategy)), None
    if strategy != "no":
        held_out = source | {"split": test_split}
        if local_files(os.path.expanduser(resolve_path(name))) and train_split != test_split:
            raise RequestError(
                f"--eval_strategy: found {strategy}, but {name} has no split {test_split!r} to evaluate on: give a folder "
                "with files named train and test, or set --eval_strategy no"
            )
    return {"train": source, "eval": held_out, "eval_fraction": 0.0, "max_length": args.max_length or 512,
            "max_prompt_length": args.max_prompt_length, "overlong": args.overlong,
            "completion_end": args.completion_end, "template_kwargs": args.template_kwargs or {}}  # fmt: skip


def training_of(args: ORPOConfig) -> dict[str, Any]:
    """Return the fields of transformers and ours that differ from their defaults, and TRL's own defaults."""
    plain = ORPOConfig("plain")
    elsewhere = {*SET_BY_OTHER_SECTIONS, "resume_from_checkpoint"}
    names = [f.name for f in fields(TrainingArguments) if f.init] + ["save_minutes", "early_stopping_patience"]
    given = {name: getattr(args, name) for name in names if getattr(args, name) != getattr(plain, name)}
    return TRLS | {name: getattr(value, "value", value) for name, value in given.items() if name not in elsewhere}


def main(words: Sequence[str]) -> None:
    """Do what TRL's script does, as a run: its folder is output_dir.

    Raises:
        RequestError: flags that cannot be used, named.
    """
    script, args, model = parse(words)
    asked = str(args.resume_from_checkpoint or False).lower()
    if asked not in ("true", "false"):
        raise RequestError(
            f"--resume_from_checkpoint: found {args.resume_from_checkpoint}, expected true: the newest good checkpoint of "
            "output_dir is resumed from"
        )
    with renaming_field("--model_name_or_path"):
        recipe = recipe_of(script, args, model)
        check_local_files(recipe)
        again = shlex.join(["python", "-m", "orpo_lite.compat.trl_orpo", *words])
        train(recipe, asked == "true", again=again)


def start(**_: Any) -> None:
    """Run the command line.

    Raises:
        RequestError: TRL is not installed.
    """
    if importlib.util.find_spec("trl") is None:
        raise RequestError("TRL's flags are parsed by TRL, which is not installed: pip install 'orpo_lite[trl]'")
    # transformers' own has a value, as in --debug=underflow_overflow
    main([word for word in sys.argv[1:] if word != "--debug"])


if __name__ == "__main__":
    guard(start)
