"""`python -m orpo_lite.compat.trl_orpo`: the command lines of TRL's example, its config files, and what is refused."""

import importlib
import shlex
import sys
from pathlib import Path

import pytest
import yaml
from datasets import Dataset, DatasetDict
from peft import PeftModel
from transformers import LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.train.trl_orpo import main, parse, rows_of
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
    DatasetDict(train=rows(4), test=rows(2, seed=1)).save_to_disk(folder / "saved")
    return folder


def words(place, out, *more):
    return ["--model_name_or_path", str(place / "base"), "--dataset_name", str(place / "pairs"), "--output_dir", str(out),
            "--per_device_train_batch_size", "2", "--max_steps", "2", "--disable_tqdm", "true", *more]  # fmt: skip


PEFT = ["--use_peft", "--lora_r=4", "--lora_alpha", "8", "--lora_target_modules", "q_proj", "v_proj"]


def test_trls_example_with_lora_in_4_bits(place, tmp_path, capsys):
    """The flags of TRL's own docstring, and those of its ModelConfig; old names are taken and told."""
    trainer = main(
        words(place, tmp_path / "out", *PEFT, "--load_in_4bit", "--use_bnb_nested_quant", "--attn_implementation", "eager",
              "--learning_rate", "8e-5", "--gradient_accumulation_steps", "1", "--eval_strategy", "steps", "--eval_steps", "1",
              "--optim", "rmsprop", "--warmup_ratio", "0.5", "--logging_first_step", "--no_remove_unused_columns", "--bf16",
              "--report_to", "none", "--no_gradient_checkpointing", "--max_length", "96", "--beta", "0.2")
    )  # fmt: skip
    model, args = trainer.model, trainer.args
    assert isinstance(model, PeftModel) and model.peft_config["default"].r == 4
    assert any(type(module).__name__ == "Linear4bit" for module in model.modules())
    assert model.config._attn_implementation == "eager" and not args.activation_checkpointing
    assert (args.beta, args.max_length, args.warmup_steps, args.optim) == (0.2, 96, 0.5, "rmsprop")
    assert trainer.state.global_step == 2 and len(trainer.eval_dataset) == 3
    assert [log for log in trainer.state.log_history if "eval_loss" in log]
    assert (tmp_path / "out" / "adapter_model.safetensors").is_file()
    assert "--warmup_ratio is called --warmup_steps now" in capsys.readouterr().err


def test_a_config_file_and_the_whole_model(place, tmp_path):
    settings = dict(zip(*[iter(words(place, tmp_path / "out"))] * 2, strict=True))
    content = {key[2:]: yaml.safe_load(value) for key, value in settings.items()} | {
        "learning_rate": 1e-5,
        "max_steps": 5,
    }
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(content))
    trainer = main(["--config", str(tmp_path / "config.yaml"), "--max_steps", "1", "--push_to_hub", "false"])
    assert trainer.state.global_step == 1 and trainer.args.learning_rate == 1e-5
    assert (tmp_path / "out" / "model.safetensors").is_file()


def test_files_folders_and_saved_data_sets_are_data_sets(place, tmp_path):
    def read(name, split="train", **more):
        script, *_ = parse(["--dataset_name", str(name), "--output_dir", str(tmp_path)])
        script.dataset_streaming = more.get("streaming", False)
        return rows_of(script, split)

    rows(5).to_parquet(tmp_path / "rows.parquet")
    Dataset.from_dict({"prompt": ["a", "b"], "chosen": ["c", "d"], "rejected": ["e", "f"]}).to_csv(
        tmp_path / "rows.tsv", sep="\t"
    )
    assert len(read(place / "pairs")) == 6 and len(read(place / "pairs", "test")) == 3
    assert len(read(place / "saved", "test")) == 2
    assert len(read(tmp_path / "rows.parquet")) == 5
    assert read(tmp_path / "rows.tsv")[1] == {"prompt": "b", "chosen": "d", "rejected": "f"}
    assert next(iter(read(place / "pairs", streaming=True)))["chosen"][0]["role"] == "assistant"
    (tmp_path / "broken.jsonl").write_text('{"chosen": "a"\n')
    with pytest.raises(RequestError, match=r"broken\.jsonl:1: broken JSON"):
        read(tmp_path / "broken.jsonl")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--lora_alfa", "8"], "no flag --lora_alfa .did you mean lora_alpha"),
        (["--truncation_mode", "keep_end"], "truncation_mode no longer exists: remove it"),
        (["--beta", "much"], "argument --beta: invalid float value: 'much'"),
        (["--beta", "-1"], "beta: found -1.0, expected a number from 0 up"),
        (["--load_in_4bit"], "--load_in_4bit: quantized weights cannot be trained: add --use_peft"),
        (["--load_in_4bit", "--load_in_8bit", "--use_peft"], "8 bit and 4 bit"),
        (["--use_peft", "--lora_target_modules", "nothing"], "nothing"),
        (["--dataset_name", "./nowhere.jsonl"], "--dataset_name: there is no file or folder ./nowhere.jsonl"),
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
    trainer = main([*words(place, tmp_path / "out", *PEFT, "--load_in_4bit")])
    assert not any("4bit" in type(module).__name__ for module in trainer.model.modules())
    assert "--load_in_4bit: bitsandbytes does not work here" in " ".join(capsys.readouterr().err.split())


def test_the_command_of_the_documentation(tmp_path, monkeypatch):
    page = Path(__file__).parents[2] / ".docs" / "pages" / "guides" / "from-trl.md"
    [line] = [line for block in blocks(page) for line in block.lines if "compat.trl_orpo" in line]
    monkeypatch.chdir(tmp_path)
    trainer = main(shlex.split(line)[3:])
    assert trainer.state.global_step == 5 and (tmp_path / "trl-orpo-demo" / "adapter_model.safetensors").is_file()


def test_without_trl_the_extra_is_named(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(RequestError, match=r"pip install 'orpo_lite\[trl\]'"):
        importlib.import_module("orpo_lite.compat.trl_orpo").start()
