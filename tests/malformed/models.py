"""Base models and adapters that cannot be loaded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import PACKAGE
from tests.malformed.case import Case

MODEL = PACKAGE / "data" / "quickstart" / "model"
Damage = Callable[[Path], None]


def edited(name: str, **changes: Any) -> Damage:
    """Fields of a JSON file set, or removed where None."""

    def damage(folder: Path) -> None:
        content = json.loads((folder / name).read_text("utf-8")) | changes
        (folder / name).write_text(json.dumps({k: v for k, v in content.items() if v is not None}), "utf-8")

    return damage


def without(*names: str) -> Damage:
    return lambda folder: [(folder / name).unlink() for name in names] and None


def holding(name: str, content: bytes) -> Damage:
    return lambda folder: (folder / name).write_bytes(content) and None


def cut(name: str, share: float) -> Damage:
    def damage(folder: Path) -> None:
        content = (folder / name).read_bytes()
        (folder / name).write_bytes(content[: int(len(content) * share)])

    return damage


def sharded(*left: str, **names: str) -> Damage:
    """The weights in two shards, of which only some are there; `names` replace those that the index gives."""

    def damage(folder: Path) -> None:
        tensors = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        keys, index = sorted(tensors), {}
        for name, part in (("one.safetensors", keys[::2]), ("two.safetensors", keys[1::2])):
            if name in left:
                save_file({key: tensors[key] for key in part}, folder / name, metadata={"format": "pt"})
            index |= dict.fromkeys(part, names.get(name.partition(".")[0], name))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": index}))

    return damage


def tensors(name: str, change: Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]) -> Damage:
    def damage(folder: Path) -> None:
        save_file(change(load_file(folder / name)), folder / name, metadata={"format": "pt"})

    return damage


def pickled(name: str, to: str) -> Damage:
    def damage(folder: Path) -> None:
        torch.save(load_file(folder / name), folder / to)
        (folder / name).unlink()

    return damage


def model(folder: Path, *damages: Damage) -> Path:
    """A copy of the quickstart's model, damaged."""
    shutil.copytree(MODEL, folder / "base")
    for damage in damages:
        damage(folder / "base")
    return folder / "base"


def base(*damages: Damage) -> Callable[[Path], list[str]]:
    """The command that trains on a damaged model."""

    def make(folder: Path) -> list[str]:
        model(folder, *damages)
        return ["train", "--recipe", "quickstart", "model.name_or_path=./base", "model.quantization=none"]

    return make


def adapter(folder: Path, *damages: Damage) -> Path:
    """An adapter of the quickstart's model, damaged."""
    lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    get_peft_model(AutoModelForCausalLM.from_pretrained(MODEL), lora).save_pretrained(folder / "adapter")
    edited("adapter_config.json", base_model_name_or_path="builtin:quickstart/model")(folder / "adapter")
    for damage in damages:
        damage(folder / "adapter")
    return folder / "adapter"


def continued(*damages: Damage) -> Callable[[Path], list[str]]:
    """The command that goes on training a damaged adapter."""

    def make(folder: Path) -> list[str]:
        adapter(folder, *damages)
        return ["train", "--recipe", "quickstart", "adapter.init_from=./adapter", "model.quantization=none"]

    return make


def merged(*damages: Damage, words: tuple[str, ...] = ()) -> Callable[[Path], list[str]]:
    """The command that merges a damaged adapter."""

    def make(folder: Path) -> list[str]:
        adapter(folder, *damages)
        return ["merge", "adapter", "--output", "merged", *words]

    return make


def run(*words: str, damage: Damage | None = None, name: str = "evaluate") -> Callable[[Path], list[str]]:
    """A command on a finished run, made by hand."""

    def make(folder: Path) -> list[str]:
        place = adapter(folder).rename(folder / "run")
        for file in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            shutil.copyfile(MODEL / file, place / file)
        Recipe.load("quickstart", ["adapter.r=2", "model.quantization=none"]).save(place / "recipe.yaml")
        (place / "run.json").write_text(json.dumps({"base_model": {"dtype": "float32"}}))
        if damage:
            damage(place)
        return [name, "run", *words]

    return make


def evaluated(content: bytes) -> Callable[[Path], list[str]]:
    def make(folder: Path) -> list[str]:
        (folder / "held.jsonl").write_bytes(content)
        return run("--data", "held.jsonl")(folder)

    return make


def nan(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    key = sorted(given)[3]
    return given | {key: given[key].index_fill(0, torch.tensor([1]), float("nan"))}


def wide(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {key: torch.ones(2, value.shape[1] * 2) if "lora_A" in key else value + 1 for key, value in given.items()}


def short(given: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return dict(sorted(given.items())[2:])


WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
MODELS = [
    Case("no-such-folder", lambda _: ["train", "--recipe", "quickstart", "model.name_or_path=./gone"],
         "model.name_or_path", "no folder ./gone", "give the path of a model folder, or a hub id"),
    Case("endless-name", lambda _: ["train", "--recipe", "quickstart", f"model.name_or_path={'a' * 5000}"],
         "model.name_or_path", "neither a local folder nor", "https://huggingface.co"),
    Case("no-such-user", lambda _: ["train", "--recipe", "quickstart", "model.name_or_path=~nobody-here/base"],
         "model.name_or_path", "no folder ~nobody-here/base", "give the path of a model folder, or a hub id"),
    Case("a-file", lambda folder: [(folder / "base").write_text("x") and "train", "--recipe", "quickstart",
         "model.name_or_path=./base"], "model.name_or_path", "is a file", "give its folder"),
    Case("no-config", base(without("config.json")), "base has no config.json", "not a model folder", "copy or download it again"),
    Case("config-cut", base(cut("config.json", 0.5)), "config.json of ./base", "is broken", "copy or download it again"),
    Case("config-a-list", base(holding("config.json", b"[]")), "model.name_or_path", "has no config.json that says",
         "see https"),
    Case("config-without-type", base(edited("config.json", model_type=None)), "model.name_or_path",
         "has no config.json that says what model it is", "see https"),
    Case("architecture-unknown", base(edited("config.json", model_type="perceptron")), "model.name_or_path", "`perceptron`",
         "pip install --upgrade transformers"),
    Case("architecture-without-answers", base(edited("config.json", model_type="vit", architectures=["ViTModel"])),
         "model.name_or_path", "ViTConfig", "use a model that writes text"),
    Case("sizes-of-another", base(edited("config.json", hidden_size=96)), "model.name_or_path", "weights do not fit config.json",
         "copy or download it again"),
    Case("sizes-impossible", base(edited("config.json", num_attention_heads=0)), "model.name_or_path", "config.json",
         "copy or download it again"),
    Case("no-weights", base(without("model.safetensors")), "model.name_or_path", "no model.safetensors",
         "copy or download it"),
    Case("weights-truncated", base(cut("model.safetensors", 0.7)), "base/model.safetensors", "not a whole safetensors file",
         "copy or download it again"),
    Case("weights-empty", base(holding("model.safetensors", b"")), "base/model.safetensors", "not a whole safetensors file",
         "copy or download it again"),
    Case("weights-a-text", base(holding("model.safetensors", b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n")),
         "base/model.safetensors", "a Git LFS pointer", "git lfs pull"),
    Case("weights-pickled", base(pickled("model.safetensors", "pytorch_model.bin")), "model.name_or_path", "pickled",
         "save_pretrained"),
    Case("weights-lacking", base(tensors("model.safetensors", short)), "model.name_or_path", "lacks 3 weight(s)",
         "check that this is the whole model"),
    Case("shard-missing", base(sharded("one.safetensors")), "base/two.safetensors", "is missing", "copy or download it"),
    Case("shard-outside", base(sharded("one.safetensors", two="../two.safetensors")), "model.safetensors.index.json",
         "'../two.safetensors'", "inside of the folder"),
    Case("index-broken", base(sharded("one.safetensors", "two.safetensors"), cut("model.safetensors.index.json", 0.5)),
         "model.safetensors.index.json", "is broken", "copy or download it again"),
    Case("no-tokenizer", base(without("tokenizer.json", "tokenizer_config.json")), "model.name_or_path", "no readable tokenizer",
         "copy the tokenizer's files"),
    Case("tokenizer-cut", base(cut("tokenizer.json", 0.5)), "base/tokenizer.json", "broken JSON", "copy or download it again"),
    Case("no-eos", base(edited("tokenizer_config.json", eos_token=None), edited("config.json", eos_token_id=None)),
         "model.name_or_path", "no EOS token", "eos_token"),
    Case("no-template", base(without("chat_template.jinja")), "model.chat_template", "no chat template", "chatml"),
    Case("template-broken", base(holding("chat_template.jinja", b"{% for m in messages %}{{ m.content }}")),
         "row 0 of", "refused by the template", "endfor"),
    Case("template-named-wrongly", lambda _: ["train", "--recipe", "quickstart", "model.chat_template=chatlm"],
         "model.chat_template", "no template 'chatlm'", "did you mean chatml?"),
    Case("remote-code", base(edited("config.json", model_type="mine", auto_map={"AutoConfig": "code.Config"}),
         holding("code.py", b"open('owned', 'w')\n")), "model.trust_remote_code", "runs Python code", "if you trust it"),
]  # fmt: skip
ADAPTERS = [
    Case("no-such-folder", lambda _: ["train", "--recipe", "quickstart", "adapter.init_from=./gone"],
         "adapter", "gone: there is no such folder", "the folder of an adapter, or a hub id"),
    Case("no-config", continued(without(CONFIG)), "adapter: ", "no adapter_config.json", "not an adapter folder"),
    Case("config-cut", continued(cut(CONFIG, 0.5)), f"adapter/{CONFIG}", "broken JSON", "copy or download it again"),
    Case("not-lora", continued(edited(CONFIG, peft_type="IA3", target_modules=["q_proj"], feedforward_modules=[])),
         "adapter: ", "type", "expected LORA"),
    Case("type-unknown", continued(edited(CONFIG, peft_type="MAGIC")), "adapter: ", "MAGIC", "expected LORA"),
    Case("rank-as-word", continued(edited(CONFIG, r="two")), "adapter: ", "r is 'two'", "expected a whole number"),
    Case("no-weights", continued(without(WEIGHTS)), "adapter: ", f"no {WEIGHTS}", "copy or download it again"),
    Case("weights-truncated", continued(cut(WEIGHTS, 0.5)), f"adapter/{WEIGHTS}", "not a whole safetensors file",
         "copy or download it again"),
    Case("pickle", continued(pickled(WEIGHTS, "adapter_model.bin")), "adapter/adapter_model.bin", "pickle",
         "weights_only=True"),
    Case("nan", continued(tensors(WEIGHTS, nan)), f"adapter/{WEIGHTS}", "1 of 12", "not finite"),
    Case("shapes", continued(tensors(WEIGHTS, wide)), "adapter: ", ", here [", "check that this is its base"),
    Case("tensors-missing", continued(tensors(WEIGHTS, short)), "adapter: ", "lacks 2 tensor(s)", "save or download it again as a whole"),
    Case("other-modules", continued(edited(CONFIG, target_modules=["query_key_value"])), "adapter: ",
         "query_key_value", "check that this is its base"),
    Case("modules-no-expression", continued(edited(CONFIG, target_modules="(q_proj+")), "adapter: ",
         "missing ), unterminated subpattern", "check that this is its base"),
    Case("merge-pickle", merged(pickled(WEIGHTS, "adapter_model.bin")), "adapter/adapter_model.bin", "pickle",
         "weights_only=True"),
    Case("merge-nan", merged(tensors(WEIGHTS, nan)), f"adapter/{WEIGHTS}", "1 of 12", "not finite"),
    Case("merge-truncated", merged(cut(WEIGHTS, 0.5)), f"adapter/{WEIGHTS}", "not a whole safetensors file",
         "copy or download it again"),
    Case("merge-shapes", merged(tensors(WEIGHTS, wide)), "adapter", ", here [", "check that this is its base"),
    Case("merge-base-gone", merged(words=("--base", "./gone")), "--base", "no folder ./gone",
         "give the path of a model folder, or a hub id"),
    Case("merge-base-of-adapter-gone", merged(edited(CONFIG, base_model_name_or_path="./gone")), f"adapter/{CONFIG}",
         "no folder ./gone", "--base"),
    Case("merge-output-in-use", merged(words=("--output", "adapter")), "--output", "is not empty", "choose another folder"),
    Case("run-unfinished", run(damage=without("run.json")), "run", "no run.json", "--resume"),
    Case("run-record-cut", run(damage=cut("run.json", 0.5)), "run/run.json", "broken JSON", "train it again"),
    Case("run-pickle", run(damage=pickled(WEIGHTS, "adapter_model.bin")), "run/adapter_model.bin", "pickle",
         "weights_only=True"),
    Case("evaluate-data-gone", run("--data", "gone.jsonl"), "--data", "gone.jsonl: no such file", ".parquet"),
    Case("evaluate-data-dropped", evaluated(b'{"prompt": "a", "chosen": "b", "rejected": "b"}\n'), "--data: 1 of 1 row",
         "chosen equal to rejected", "fix the data"),
    Case("report-of-no-run", lambda _: ["report", "gone"], "gone", "no such folder", "a run folder"),
]  # fmt: skip
