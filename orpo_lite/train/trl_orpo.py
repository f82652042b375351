"""TRL's examples/scripts/orpo.py by its own flags: `python -m orpo_lite.compat.trl_orpo --model_name_or_path ...`.

The parser is TRL's, over TRL's ScriptArguments and ModelConfig and our ORPOConfig, so `--config FILE` and every flag of
those work; it needs the extra `trl`. `accelerate launch -m orpo_lite.compat.trl_orpo ...` starts it on several GPUs.
"""

from __future__ import annotations

import importlib.util
import itertools
import os
import sys
from collections.abc import Iterator, Sequence
from dataclasses import fields
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from pyarrow import ArrowException
from rich.markup import escape
from yaml import YAMLError

from orpo_lite.common.console import errors, guard
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import nearest
from orpo_lite.data.file_formats import read_file
from orpo_lite.data.sources import is_local, load_hub, load_saved, local_files
from orpo_lite.model.locating import hub_errors_in_words, locate, renaming_field
from orpo_lite.model.precision import bitsandbytes_unavailable, choose_precision
from orpo_lite.recipe import DataSource, ModelSection
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.trainer.config import REMOVED_FIELDS, RENAMED_FIELDS, ORPOConfig, outdated_fields
from orpo_lite.trainer.setup import load_by_name, tokenizer_of
from orpo_lite.trainer.trainer import ORPOTrainer

if TYPE_CHECKING:
    from orpo_lite.trainer.trl_names import TrlNames


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
        *parsed, rest = parser().parse_args_and_config([current(word) for word in words], return_remaining_strings=True)
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
        outdated = RENAMED_FIELDS | REMOVED_FIELDS
        lines = [
            outdated_fields([name], known)[0] if name in outdated else f"no flag --{name}{nearest(name, known)}"
            for name in names
        ]
        raise RequestError("; ".join(lines) or f"found {' '.join(rest)} without a flag before it")
    return tuple(parsed)


def current(word: str) -> str:
    """Return a flag by its present name, and print a notice if it had another."""
    name, equals, value = word.partition("=")
    new = RENAMED_FIELDS.get(name.removeprefix("--").replace("-", "_")) if name.startswith("--") else None
    if new is None:
        return word
    errors.print(f"{escape(name)} is called --{new} now, and is used as that")
    return f"--{new}{equals}{value}"


def rows_of(script: Any, split: str) -> Any:
    """Load one split of the data set: a folder, files, or a data set of the hub; never code, never pickles.

    Raises:
        RequestError: it does not exist, has no such split, or cannot be read.
    """
    import datasets

    name, streaming = script.dataset_name, script.dataset_streaming
    if not name:
        raise RequestError("--dataset_name is missing: give a file, a folder, or a data set of the hub as owner/name")
    path = os.path.expanduser(resolve_path(name))
    with renaming_field("--dataset_name"):
        if any(os.path.isfile(os.path.join(path, kept)) for kept in ("state.json", "dataset_dict.json")):
            saved = load_saved(path, split)
            return saved.to_iterable_dataset() if streaming else saved
        files = local_files(path, split)
        if not files and is_local(name):
            raise RequestError(f"--dataset_name: there is no file or folder {name}")
        if not files:
            return load_hub(DataSource(path=name, name=script.dataset_config), split, streaming)

    def read() -> Iterator[dict[str, Any]]:
        return itertools.chain.from_iterable(itertools.chain.from_iterable(map(read_file, files)))

    if streaming:
        return datasets.IterableDataset.from_generator(read)
    try:
        return datasets.Dataset.from_list([*read()])
    except ArrowException as error:
        raise RequestError(
            f"{', '.join(files[:3])}: the rows are no table: {' '.join(str(error).split())[:300]}"
        ) from error


def held_out(script: Any, args: ORPOConfig) -> Any:
    """Load the held-out split if there are evaluations, as in TRL's script.

    Raises:
        RequestError: the data has no such split, or it would be the training split again.
    """
    strategy = str(getattr(args.eval_strategy, "value", args.eval_strategy))
    if strategy == "no":
        return None
    train, test = script.dataset_train_split, script.dataset_test_split
    path = os.path.expanduser(resolve_path(script.dataset_name or ""))
    saved = os.path.isfile(os.path.join(path, "dataset_dict.json"))
    if not saved and Path(path).exists() and local_files(path, train) == local_files(path, test) and train != test:
        raise RequestError(
            f"--eval_strategy: found {strategy}, but {script.dataset_name} has no split {test!r} to evaluate "
            "on: give a folder with files named train and test, or set --eval_strategy no"
        )
    return rows_of(script, test)


def trainer_of(script: Any, args: ORPOConfig, model: Any) -> ORPOTrainer:
    """Make the trainer as TRL's script does, with the ModelConfig's dtype, attention and quantization applied.

    Raises:
        RequestError: flags that do not go together, or a model or data set that cannot be used.
    """
    from trl import get_peft_config, get_quantization_config  # pyright: ignore[reportPrivateImportUsage]

    if not model.model_name_or_path:
        raise RequestError("--model_name_or_path is missing: give a model's folder, or its id on the hub as owner/name")
    with renaming_field("--model_name_or_path"):
        name = locate(ModelSection(name_or_path=model.model_name_or_path))
    if model.load_in_4bit or model.load_in_8bit:
        flag = "--load_in_4bit" if model.load_in_4bit else "--load_in_8bit"
        if not model.use_peft:
            raise RequestError(f"{flag}: quantized weights cannot be trained: add --use_peft, or leave it out")
        if why := bitsandbytes_unavailable():
            errors.print(f"{flag}: {escape(why)}")
            model.load_in_4bit = model.load_in_8bit = False
    if model.load_in_4bit and model.dtype in (None, "auto"):
        model.dtype = str(choose_precision("auto", args.device).dtype).removeprefix("torch.")
    given = {"revision": model.model_revision, "attn_implementation": model.attn_implementation, "dtype": model.dtype,
             "quantization_config": get_quantization_config(model),
             "use_safetensors": True}  # fmt: skip  # no pickle of a stranger's
    own: dict[str, Any] = dict(args.model_init_kwargs or {})  # type: ignore[arg-type]  # parsed by now
    args.model_init_kwargs = {key: value for key, value in given.items() if value is not None} | own
    train, test = rows_of(script, script.dataset_train_split), held_out(script, args)
    adapter = get_peft_config(model)
    with renaming_field("--model_name_or_path"), hub_errors_in_words(name):
        base = load_by_name(name, args, adapter is not None)
        tokenizer = tokenizer_of(base, args)
    args.model_init_kwargs = None
    try:
        trainer = ORPOTrainer(base, args, None, train, test, tokenizer, peft_config=adapter)
    except ValueError as error:
        raise RequestError(" ".join(str(error).split())) from error
    if script.ignore_bias_buffers:
        import torch

        buffers = [key for key, buffer in trainer.model.named_buffers() if buffer.dtype == torch.bool]
        trainer.model._ddp_params_and_buffers_to_ignore = buffers
    return trainer


def main(words: Sequence[str]) -> TrlNames:
    """Do what TRL's script does: train, save to output_dir, push if asked."""
    script, args, model = parse(words)
    trainer = trainer_of(script, args, model)
    asked = args.resume_from_checkpoint  # a flag's value is text
    trainer.train(resume_from_checkpoint={"true": True, "false": None}.get(str(asked).lower(), asked))
    trainer.save_model(args.output_dir)
    if args.push_to_hub:
        trainer.push_to_hub(dataset_name=script.dataset_name)
    return trainer


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
