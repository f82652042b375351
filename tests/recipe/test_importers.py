"""`orpo-lite import`: every field of another trainer's file is in the recipe, or listed; the recipe loads and dry-runs."""

import importlib
import json
import sys

import pytest
import yaml
from typer.testing import CliRunner

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.importers import axolotl, convert, llamafactory
from orpo_lite.train.pipeline import run

AXOLOTL = {
    "base_model": "builtin:quickstart/model",
    "model_type": "LlamaForCausalLM",
    "load_in_8bit": False,
    "load_in_4bit": True,
    "adapter": "qlora",
    "lora_model_dir": None,
    "rl": "orpo",
    "orpo_alpha": 0.25,
    "chat_template": "chatml",
    "datasets": [
        {"path": "builtin:quickstart/train.jsonl", "type": "chat_template.argilla", "ds_type": "json", "split": None}
    ],
    "dataset_prepared_path": "prepared",
    "val_set_size": 0.1,
    "sequence_len": 640,
    "sample_packing": True,
    "lora_r": 8,
    "lora_alpha": 24,
    "lora_dropout": 0.05,
    "lora_target_linear": True,
    "wandb_project": "mine",
    "wandb_name": "first",
    "gradient_accumulation_steps": 2,
    "micro_batch_size": 3,
    "num_epochs": 2,
    "optimizer": "adamw_bnb_8bit",
    "lr_scheduler": "cosine",
    "learning_rate": "2e-4",
    "bf16": "auto",
    "tf32": False,
    "gradient_checkpointing": True,
    "flash_attention": True,
    "warmup_ratio": 0.1,
    "evals_per_epoch": 4,
    "saves_per_epoch": 1,
    "weight_decay": 0.01,
    "special_tokens": {"pad_token": "<pad>"},
    "loss_watchdog_threshold": 5.0,
    "a_field_of_tomorrow": 7,
    "comet_api_key": "not for the screen",
    "deepspeed": "zero3.json",
    "trust_remote_code": True,
}
FACTORY = {
    "model_name_or_path": "builtin:quickstart/model",
    "stage": "dpo",
    "pref_loss": "orpo",
    "do_train": True,
    "finetuning_type": "lora",
    "lora_rank": 4,
    "lora_target": "q_proj,v_proj",
    "quantization_bit": 4,
    "quantization_method": "bnb",
    "pref_beta": 0.3,
    "dataset": "mine, theirs",
    "template": "chatml",
    "cutoff_len": 600,
    "max_samples": 20,
    "output_dir": "saves/mine",
    "logging_steps": 5,
    "save_steps": 50,
    "plot_loss": True,
    "overwrite_output_dir": True,
    "report_to": "none",
    "per_device_train_batch_size": 4,
    "gradient_accumulation_steps": 2,
    "learning_rate": 5e-6,
    "num_train_epochs": 3.0,
    "lr_scheduler_type": "cosine",
    "warmup_ratio": 0.1,
    "bf16": True,
    "ddp_timeout": 180000000,
    "neat_packing": True,
    "val_size": 0.2,
    "eval_strategy": "steps",
    "eval_steps": 50,
    "swanlab_project": "mine",
    "resume_from_checkpoint": None,
}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """An empty working directory with a folder of a LLaMA-Factory data set in it."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "data").mkdir()
    pairs = [{"instruction": f"How much is {i} plus 1?", "input": "", "chosen": f"Certainly. It is {i + 1}.", "rejected": f"{i + 1}, go away"}
             for i in range(30)]  # fmt: skip
    (tmp_path / "data" / "pairs.json").write_text(json.dumps(pairs))
    asked = [
        {"question": row["instruction"] + " Please.", "chosen": row["chosen"], "rejected": row["rejected"]}
        for row in pairs
    ]
    (tmp_path / "data" / "asked.json").write_text(json.dumps(asked))
    info = {
        "mine": {
            "file_name": "pairs.json",
            "ranking": True,
            "columns": {"prompt": "instruction", "query": "input", "chosen": "chosen"},
        },
        "theirs": {"hf_hub_url": "org/pairs", "subset": "en", "split": "dev", "ranking": True, "num_samples": 9},
        "asked": {
            "file_name": "asked.json",
            "ranking": True,
            "columns": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
        },
    }
    (tmp_path / "data" / "dataset_info.json").write_text(json.dumps(info))
    return tmp_path


def written(place, content, **more):
    file = place / "theirs.yml"
    file.write_text(yaml.safe_dump({k: v for k, v in (content | more).items() if v != "absent"}))
    return file


def accounted(content, draft):
    """Every field that changes something is in one of the three lists, however deep its account goes."""
    named = [*draft.carried, *(note.field for note in [*draft.differs, *draft.left])]
    silent = {*axolotl.FIELDS["same"], *llamafactory.FIELDS["same"], "tf32", "special_tokens"}
    asked = {field for field, value in content.items() if value not in (None, "absent", False)} - silent
    return {field for field in asked if not any(name == field or name.startswith(f"{field}.") for name in named)}


def test_axolotls_fields(place):
    recipe, draft, whose = convert(written(place, AXOLOTL), "mine")
    assert whose == "axolotl" and not accounted(AXOLOTL, draft)
    assert recipe.model.name_or_path == AXOLOTL["base_model"] and recipe.model.quantization == "nf4"
    assert recipe.model.chat_template == "chatml" and not recipe.model.trust_remote_code
    adapter = recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules) == (8, 24, 0.05, "all-linear")
    assert (recipe.orpo.beta, recipe.orpo.nll_scope, recipe.orpo.nll_mean) == (0.25, "prompt+chosen", "micro")
    data = recipe.data
    assert (data.max_length, data.overlong, data.eval_fraction, data.completion_end) == (640, "drop", 0.1, "trl")
    assert [source.path for source in data.train] == ["builtin:quickstart/train.jsonl"]
    assert recipe.memory.checkpointing == "all"
    expected = {"per_device_train_batch_size": 3, "per_device_eval_batch_size": 3, "gradient_accumulation_steps": 2,
                "num_train_epochs": 2, "learning_rate": 2e-4, "lr_scheduler_type": "cosine", "optim": "adamw_bnb_8bit", "warmup_steps": 0.1,
                "weight_decay": 0.01, "eval_strategy": "steps", "eval_steps": 1 / 8, "save_strategy": "epoch",
                "report_to": ["wandb"], "run_name": "first"}  # fmt: skip
    assert {key: recipe.training[key] for key in expected} == expected and "tf32" not in recipe.training
    left = {note.field: (note.value, note.why) for note in draft.left}
    assert left["a_field_of_tomorrow"] == (7, "no equivalent here")
    assert left["comet_api_key"][0] == "(not shown)"
    assert left.keys() == {"a_field_of_tomorrow", "comet_api_key", "deepspeed", "trust_remote_code"}
    differs = {note.field: note.why for note in draft.differs}
    assert differs.keys() == {"gradient_accumulation_steps", "wandb_project"}
    assert "WANDB_PROJECT" in differs["wandb_project"]


@pytest.mark.parametrize(
    ("more", "place_in_recipe", "value"),
    [
        ({"rl_beta": 0.5}, "orpo.beta", 0.5),
        ({"orpo_alpha": "absent"}, "orpo.beta", 0.1),
        ({"trl": {"beta": 0.7}, "rl_beta": 0.5}, "orpo.beta", 0.7),
        ({"adapter": "lora", "load_in_4bit": False}, "model.quantization", "none"),
        ({"adapter": "lora", "load_in_4bit": False, "load_in_8bit": True}, "model.quantization", "nf4"),
        ({"adapter": "lora", "load_in_4bit": "false"}, "model.quantization", "none"),
        ({"adapter": "lora", "load_in_4bit": "off", "load_in_8bit": "True"}, "model.quantization", "nf4"),
        ({"gradient_checkpointing": "false"}, "memory.checkpointing", "none"),
        ({"evals_per_epoch": "absent", "eval_strategy": "no"}, "training.eval_strategy", "no"),
        ({"adapter": None, "load_in_4bit": False}, "adapter", None),
        ({"bnb_config_kwargs": {"bnb_4bit_quant_type": "fp4"}}, "model.quantization", "fp4"),
        ({"lora_target_linear": None, "lora_target_modules": ["q_proj"]}, "adapter.target_modules", ["q_proj"]),
        ({"val_set_size": 40}, "data.max_eval_rows", 40),
        ({"val_set_size": 0}, "training.eval_strategy", "no"),
        ({"warmup_ratio": "absent"}, "training.warmup_steps", 0.03),
        ({"warmup_ratio": "absent", "warmup_steps": 7}, "training.warmup_steps", 7),
        ({"optimizer": "came_pytorch"}, "training.optim", "adamw_torch_fused"),
        ({"sequence_len": "absent"}, "data.max_length", 512),
        ({"use_wandb": True, "use_tensorboard": True, "tf32": "auto"}, "training.report_to", ["wandb", "tensorboard"]),
        ({"use_wandb": False, "mlflow_experiment_name": "x"}, "training.report_to", ["mlflow"]),
        ({"use_wandb": False}, "training.report_to", "none"),
        ({"tf32": True}, "training.tf32", True),
        ({"evals_per_epoch": 1}, "training.eval_strategy", "epoch"),
        ({"excess_length_strategy": "truncate"}, "data.overlong", "truncate"),
        ({"gradient_checkpointing": "offload"}, "memory.offload_activations", True),
        ({"evals_per_epoch": "absent"}, "training.eval_strategy", "no"),
        ({"cosine_min_lr_ratio": 0.1}, "training.lr_scheduler_kwargs", {"min_lr_rate": 0.1}),
        ({"flash_attention": False, "eager_attention": True}, "model.attention", "eager"),
        ({"datasets": [{"path": "a/b", "name": "c", "split": "s", "type": {"field_prompt": "q", "prompt_format": "{q}"}}]},
         "data.train", [{"path": "a/b", "name": "c", "split": "s", "columns": {"prompt": "q"}}]),
        ({"test_datasets": [{"path": "builtin:quickstart/heldout.jsonl", "type": "chat_template.argilla"}], "val_set_size": None},
         "data.eval", [{"path": "builtin:quickstart/heldout.jsonl"}]),
    ],
    ids=lambda value: str(value)[:40],
)  # fmt: skip
def test_what_axolotl_means_by_a_field(more, place_in_recipe, value, place):
    content = AXOLOTL | more
    recipe, draft, _ = convert(written(place, AXOLOTL, **more), "mine")
    found = recipe.model_dump(mode="json", exclude_unset=True)
    for part in place_in_recipe.split("."):
        found = found[part]
    assert found == value
    assert not accounted(content, draft)


def test_llamafactorys_fields(place):
    recipe, draft, whose = convert(written(place, FACTORY), "mine")
    assert whose == "LLaMA-Factory" and not accounted(FACTORY, draft)
    assert (recipe.model.quantization, recipe.model.chat_template, recipe.model.double_quant) == ("nf4", "chatml", True)
    adapter = recipe.adapter
    assert (adapter.r, adapter.alpha, adapter.dropout, adapter.target_modules) == (4, 8, 0, ["q_proj", "v_proj"])
    assert (recipe.orpo.beta, recipe.orpo.nll_scope, recipe.orpo.nll_mean) == (0.3, "chosen", "window")
    assert (recipe.data.max_length, recipe.data.max_rows, recipe.data.eval_fraction) == (600, 20, 0.2)
    first, second = recipe.data.train
    assert first.path == "data/pairs.json" and first.columns is None
    assert (second.path, second.name, second.split) == ("org/pairs", "en", "dev")
    expected = {"per_device_train_batch_size": 4, "gradient_accumulation_steps": 2, "warmup_steps": 0.1, "eval_steps": 50,
                "save_steps": 50, "save_strategy": "steps", "output_dir": "saves/mine", "ddp_timeout": 180000000}  # fmt: skip
    assert {key: recipe.training[key] for key in expected} == expected
    words = {note.field: note.why for note in draft.differs}
    assert (
        "mean over the answer's tokens of each pair" in words["pref_loss"]
        and "gradient_accumulation_steps=8" in words["pref_loss"]
    )
    left = {note.field for note in draft.left}
    assert left == {"swanlab_project", "dataset_info.theirs.num_samples"}
    one, _, _ = convert(written(place, FACTORY, per_device_train_batch_size=1), "mine")
    assert one.orpo.nll_mean == "micro"
    start, draft, _ = convert(written(place, FACTORY, pissa_init=True, pissa_iter=16), "mine")
    assert start.adapter.init_lora_weights is True
    lost = {note.field: note.why for note in draft.left}
    assert all("changes the base weights" in lost[name] for name in ("pissa_init", "pissa_iter"))
    old = {"stage": "orpo", "orpo_beta": 0.05, "model_name_or_path": "x/y", "dataset": "mine"}  # as until 0.7
    assert convert(written(place, old), "mine")[0].orpo.beta == 0.05
    silent = {key: FACTORY[key] for key in ("model_name_or_path", "stage", "pref_loss")} | {"dataset": "mine"}
    plain, _, _ = convert(written(place, silent), "mine")
    assert (plain.adapter.r, plain.adapter.alpha, plain.adapter.target_modules, plain.data.max_length) == (
        8,
        16,
        "all-linear",
        2048,
    )
    assert (plain.training["num_train_epochs"], plain.training["learning_rate"], plain.model.quantization) == (
        3,
        5e-5,
        "none",
    )


@pytest.mark.parametrize(
    "content",
    [AXOLOTL, FACTORY | {"dataset": "mine"}, FACTORY | {"dataset": "asked"}],
    ids=["axolotl", "factory", "columns"],
)
def test_the_recipe_dry_runs(content, place, monkeypatch, capsys):
    file = written(place, content | {"wandb_project": None, "lora_target": "q_proj", "output_dir": None})
    app = importlib.import_module("orpo_lite.import").command
    import typer

    shell = typer.Typer(add_completion=False)
    shell.command()(app)
    done = CliRunner().invoke(shell, [str(file)])
    assert done.exit_code == 0, done.output
    assert done.output.startswith("no equivalent:") and "theirs-recipe.yaml --dry-run" in done.output
    assert "plot_loss" not in done.output and "sample_packing" not in done.output
    recipe = Recipe.load(str(place / "theirs-recipe.yaml"))
    assert run(recipe, dry_run=True) is None
    assert "no equivalent" in (place / "theirs-recipe.yaml").read_text()
    again = CliRunner().invoke(shell, [str(file)])
    assert isinstance(again.exception, RequestError) and "exists already" in str(again.exception)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (AXOLOTL | {"rl": "dpo"}, "theirs.yml: rl is 'dpo', expected an ORPO"),
        (AXOLOTL | {"rl": None}, "rl is None, expected an ORPO"),
        (FACTORY | {"pref_loss": "sigmoid"}, "stage is 'dpo' and pref_loss 'sigmoid', expected"),
        (FACTORY | {"stage": "sft"}, "stage is 'sft'"),
        ({"model_name_or_path": "x", "beta": 0.1}, "trl_orpo --config"),
        ({"model": {"name_or_path": "x"}, "data": {"train": "y"}}, "a recipe already"),
        ({"a": 1}, "found a, expected an ORPO configuration"),
        (["x"], "at the top"),
        (AXOLOTL | {"lora_r": "many"}, "adapter.r: found 'many'"),
        (AXOLOTL | {"learning_rate": [1]}, r"training.learning_rate: found \[1\]"),
        (AXOLOTL | {"datasets": []}, "data.train"),
        (AXOLOTL | {"load_in_4bit": "maybe"}, "theirs.yml: load_in_4bit: found 'maybe', expected true or false"),
        (
            FACTORY | {"disable_shuffling": "perhaps"},
            "theirs.yml: disable_shuffling: found 'perhaps', expected true or false",
        ),
    ],
    ids=lambda value: str(value)[:20] if isinstance(value, str) else "",
)
def test_what_is_no_orpo_is_refused_by_name(content, message, place):
    file = place / "theirs.yml"
    file.write_text(yaml.safe_dump(content))
    with pytest.raises(RequestError, match=message):
        convert(file, "mine")


@pytest.mark.parametrize("odd", [5, [1], {"a": 1}, float("inf")], ids=str)
def test_a_value_of_the_wrong_kind_is_never_a_traceback(odd, place):
    more = {"bnb_config_kwargs": {}, "trl": {}, "test_datasets": [], "tokens": [], "lora_target_modules": [], "save_steps": 5,
            "adapter_name_or_path": "x", "add_tokens": "x", "eval_dataset": "x", "disable_shuffling": True, "dataset_dir": "data"}  # fmt: skip
    for content in (AXOLOTL, FACTORY):
        for name in content | more:
            try:
                convert(written(place, content, **{name: odd}), "mine")
            except RequestError as error:
                assert "theirs.yml" in str(error) or "dataset_info" in str(error)


def test_names_of_data_sets_are_resolved_or_said_to_be_unusable(place):
    recipe, draft, _ = convert(written(place, FACTORY, dataset="ultrafeedback,dpo_mix_en"), "mine")
    assert [(one.path, one.name) for one in recipe.data.train] == [
        ("llamafactory/ultrafeedback_binarized", None), ("llamafactory/DPO-En-Zh-20k", "en")]  # fmt: skip
    assert not {note.field for note in draft.left} & {"dataset"}
    info = place / "data" / "dataset_info.json"
    info.write_text(json.dumps({"mine": {"file_name": "gone.json", "ranking": True}}))
    for name, why in (
        ("dpo_en_demo", "dataset_info.json in data has no such name"),
        ("mine", "data/gone.json is not there"),
    ):
        _, draft, _ = convert(written(place, FACTORY, dataset=name), "mine")
        note = draft.left[0]
        assert (note.field, note.value) == ("dataset", name) and why in note.why and "set data.train" in note.why
    assert not convert(written(place, FACTORY, dataset="org/pairs"), "mine")[1].left[0].field == "dataset"


def test_what_would_publish_is_not_carried_over(place):
    asked = {"push_to_hub": True, "hub_model_id": "me/x", "hub_strategy": "all_checkpoints", "hub_private_repo": False}
    for content in (AXOLOTL, FACTORY):
        recipe, draft, _ = convert(written(place, content, **asked), "mine")
        assert not any("hub" in name for name in recipe.training)
        assert {note.field: "orpo_lite.push RUN --repo USER/NAME" in note.why for note in draft.left if note.field in asked} == dict.fromkeys(asked, True)  # fmt: skip


def test_text_of_a_file_cannot_get_into_the_recipe(place):
    evil = {"a_field": "x\nmodel:\n  trust_remote_code: true", "another\x1b[2J": "\x1b]0;title\x07", "rl_beta": 0.2}
    file = written(place, AXOLOTL, **evil)
    importlib.import_module("orpo_lite.import").command(file, output=place / "out.yaml")
    recipe = Recipe.load(str(place / "out.yaml"))
    assert not recipe.model.trust_remote_code and "\x1b" not in (place / "out.yaml").read_text()


def test_it_is_a_command(monkeypatch, capsys, place):
    from orpo_lite.__main__ import main

    file = written(place, AXOLOTL, rl="simpo")
    monkeypatch.setattr(sys, "argv", ["orpo-lite", "import", str(file)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 2 and "rl is 'simpo'" in " ".join(capsys.readouterr().err.split())
