"""`python -m orpo_lite.compat.trl_orpo`: the command lines of TRL's example, its config files, and what is refused."""

import importlib
import json
import shlex
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.train.trl_orpo import TRLS, main, parse, recipe_of
from orpo_lite.trainer.run_folder import RunFolder
from tests.docs.blocks import blocks
from tests.tiny import tiny_model
from tests.training import SIZES, rows


@pytest.fixture(scope="module")
def place(tmp_path_factory, tokenizer):
    """A folder with a tiny model and a data set of two splits."""
    folder = tmp_path_factory.mktemp("place")
    tiny_model(LlamaConfig(**SIZES)).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    (folder / "pairs").mkdir()
    rows(6).to_json(folder / "pairs" / "train.jsonl")
    rows(3, seed=1).to_json(folder / "pairs" / "test.jsonl")
    return folder


def words(place, out, *more):
    return ["--model_name_or_path", str(place / "base"), "--dataset_name", str(place / "pairs"), "--output_dir", str(out),
            "--per_device_train_batch_size", "2", "--max_steps", "2", "--disable_tqdm", "true", *more]  # fmt: skip


PEFT = ["--use_peft", "--lora_r=4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"]


def test_trls_example_with_lora_in_4_bits(place, tmp_path):
    """The flags of TRL's own docstring, and those of its ModelConfig; old names are taken and told."""
    main(
        words(place, tmp_path / "out", *PEFT, "--load_in_4bit", "--use_bnb_nested_quant", "--attn_implementation", "eager",
              "--learning_rate", "8e-5", "--gradient_accumulation_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1",
              "--optim", "rmsprop", "--warmup_steps", "0.5", "--logging_first_step", "--no_remove_unused_columns", "--bf16",
              "--report_to", "none", "--no_gradient_checkpointing", "--max_length", "96", "--beta", "0.2")
    )  # fmt: skip
    folder = RunFolder(tmp_path / "out")
    recipe, record = folder.recipe(), folder.read()
    assert {"adapter_model.safetensors", "report.html", "run.json", "README.md", "recipe.yaml", "metrics.jsonl"} <= {
        path.name for path in folder.path.iterdir()
    }
    assert (recipe.model.quantization, recipe.model.double_quant, recipe.model.attention) == ("nf4", True, "eager")
    assert (recipe.adapter.r, recipe.adapter.alpha, recipe.adapter.target_modules) == (4, 8, ["q_proj", "v_proj"])
    assert (recipe.orpo.beta, recipe.data.max_length, recipe.memory.checkpointing) == (0.2, 96, "none")
    assert (recipe.data.overlong, recipe.data.completion_end) == ("truncate", "trl")
    training = {
        "learning_rate": 8e-5,
        "optim": "rmsprop",
        "warmup_steps": 0.5,
        "lr_scheduler_type": "linear",
        "seed": 42,
    }
    assert training.items() <= recipe.training.items()
    assert record["steps"] == 2 and record["data"]["eval_pairs"] == 3 and record["base_model"]["quantization"] == "nf4"
    assert record["eval"]["after"]["loss"] > 0


def test_the_losses_are_those_of_trls_script(place, tmp_path, trl_orpo):
    """TRL's own trainer on the same flags, step by step."""
    from datasets import load_dataset
    from peft import LoraConfig
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl.experimental.orpo import ORPOConfig as TRLConfig

    settings = {
        "per_device_train_batch_size": 2,
        "max_steps": 3,
        "learning_rate": 1e-3,
        "logging_steps": 1,
        "max_length": 96,
    }
    flags = [word for name, value in settings.items() for word in (f"--{name}", str(value))]
    main(
        [
            *words(place, tmp_path / "out"),
            *flags,
            "--use_peft",
            "--lora_r",
            "4",
            "--lora_dropout",
            "0",
            "--report_to",
            "none",
        ]
    )
    ours = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    torch.manual_seed(42)
    theirs = trl_orpo.ORPOTrainer(
        AutoModelForCausalLM.from_pretrained(place / "base"),
        TRLConfig(str(tmp_path / "theirs"), bf16=False, report_to="none", disable_tqdm=True, **settings),
        train_dataset=load_dataset("json", data_files=str(place / "pairs" / "train.jsonl"), split="train"),
        processing_class=AutoTokenizer.from_pretrained(place / "base"),
        peft_config=LoraConfig(
            r=4, lora_alpha=32, lora_dropout=0.0, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM"
        ),
    )
    theirs.train()
    found, right = ([log["loss"] for log in logs if "loss" in log] for logs in (ours, theirs.state.log_history))
    assert found == pytest.approx(right, abs=2e-3) and len(found) == 3


def test_a_config_file_and_the_whole_model(place, tmp_path):
    settings = dict(zip(*[iter(words(place, tmp_path / "out"))] * 2, strict=True))
    content = {key[2:]: yaml.safe_load(value) for key, value in settings.items()} | {
        "learning_rate": 1e-5,
        "max_steps": 5,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    main(["--config", str(tmp_path / "config.yaml"), "--max_steps", "1", "--push_to_hub", "false"])
    assert RunFolder(tmp_path / "out").read()["steps"] == 1
    assert RunFolder(tmp_path / "out").recipe().training["learning_rate"] == 1e-5
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_flags_become_a_recipe(place, tmp_path):
    def recipe(*more):
        return recipe_of(*parse([*words(place, tmp_path / "out"), *more]))

    plain = recipe()
    assert plain.name == "out" and plain.adapter is None and plain.data.eval is None and plain.data.eval_fraction == 0
    assert plain.training == TRLS | {"output_dir": str(tmp_path / "out"), "max_steps": 2, "disable_tqdm": True,
                                     "per_device_train_batch_size": 2}  # fmt: skip
    assert plain.memory.checkpointing == "all" and plain.evaluation.max_new_tokens == 128
    assert recipe("--use_peft").adapter.target_modules == ["q_proj", "v_proj"]  # PEFT's own for a Llama
    more = ["--dtype", "bfloat16", "--max_completion_length", "7", "--save_minutes", "3", "--weight_decay", "0.1",
            "--eval_strategy", "epoch", "--dataset_config", "main", "--lr_scheduler_type", "cosine",
            "--use_peft", "--load_in_4bit", "--lora_target_modules", "all-linear", "--loraplus_lr_ratio", "4"]  # fmt: skip
    full = recipe(*more)
    assert (full.model.dtype, full.model.quantization, full.evaluation.max_new_tokens) == ("bfloat16", "nf4", 7)
    assert full.data.eval[0].split == "test" and full.data.train[0].name == "main"
    assert (full.adapter.target_modules, full.adapter.loraplus_lr_ratio, full.adapter.dropout) == (
        "all-linear",
        4,
        0.05,
    )
    changed = {"weight_decay": 0.1, "save_minutes": 3, "eval_strategy": "epoch", "lr_scheduler_type": "cosine"}
    assert changed.items() <= full.training.items()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_alfa", "8"], "no flag --lora_alfa .did you mean lora_alpha"),
        (["--evaluation_strategy", "no"], "no flag --evaluation_strategy .did you mean eval_strategy"),
        (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (["--beta", "-1"], "beta: found -1.0, expected a number from 0 up"),
        (["--load_in_4bit"], "--load_in_4bit: quantized weights cannot be trained: add --use_peft"),
        (["--use_peft", "--load_in_8bit"], "--load_in_8bit: leave it out: give --load_in_4bit"),
        (["--push_to_hub"], "training.push_to_hub: found True, a run uploads nothing to the hub"),
        (["--generate_during_eval"], "--generate_during_eval: leave it out: a run answers held-out prompts"),
        (["--dataset_streaming"], "--dataset_streaming: leave it out: files larger than memory"),
        (
            ["--resume_from_checkpoint", "out/checkpoint-1"],
            "--resume_from_checkpoint: found out/checkpoint-1, expected true",
        ),
        (["--attn_implementation", "mine"], "model.attention"),
        (["--use_peft", "--lora_target_modules", "nothing"], "nothing"),
        (["--dataset_name", "./nowhere.jsonl"], r"\./nowhere\.jsonl: no such file or folder"),
        (["--model_name_or_path", "./nowhere"], "--model_name_or_path: there is no folder ./nowhere"),
        (["--config", "nowhere.yaml"], "--config: nowhere.yaml cannot be read"),
        (["--config"], "--config: found no file name"),
        (["stray"], "found stray without a flag"),
    ],
    ids=lambda value: " ".join(value)[:30] if isinstance(value, list) else "",
)
def test_what_cannot_be_is_refused_by_name(more, message, place, tmp_path):
    with pytest.raises(RequestError, match=message):
        main([*words(place, tmp_path / "out"), *more])
    assert not (tmp_path / "out").exists()


def test_the_training_file_is_not_evaluated_on(place, tmp_path):
    more = ["--dataset_name", str(place / "pairs" / "train.jsonl"), "--eval_strategy", "epoch"]
    with pytest.raises(RequestError, match="has no split 'test' to evaluate on.*--eval_strategy no"):
        main([*words(place, tmp_path / "out"), *more])


def test_without_bitsandbytes_weights_stay_as_they_are(place, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "bitsandbytes", None)
    main([*words(place, tmp_path / "out", *PEFT, "--load_in_4bit")])
    assert RunFolder(tmp_path / "out").read()["base_model"]["quantization"] == "none"
    assert "bitsandbytes" in " ".join(" ".join(capsys.readouterr()).split())


def test_the_command_of_the_documentation(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / ".docs" / "pages" / "guides" / "from-trl.md"
    [line] = [line for block in blocks(page) for line in block.lines if "compat.trl_orpo" in line]
    monkeypatch.chdir(tmp_path)
    main(shlex.split(line)[3:])
    assert (
        RunFolder(tmp_path / "trl-orpo-demo").read()["steps"] == 5
        and (tmp_path / "trl-orpo-demo" / "adapter_model.safetensors").is_file()
    )


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'orpo_lite\[trl\]'"):
        importlib.import_module("orpo_lite.compat.trl_orpo").start()
