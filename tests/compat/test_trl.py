"""Scripts written for TRL's ORPOTrainer: what they give to it, call on it and read from it, on a machine without a GPU."""

import typing
from dataclasses import fields

import pytest
import torch
from datasets import DatasetDict
from huggingface_hub import ModelCard, constants
from peft import LoraConfig
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    TrainerCallback,
    TrainingArguments,
)

from orpo_lite import ORPOConfig, ORPOTrainer
from orpo_lite.common.errors import RequestError
from tests.hub_server import HubServer
from tests.tiny import tiny_model
from tests.training import SIZES, rows


@pytest.fixture(scope="module")
def base(tmp_path_factory, tokenizer):
    """Folder of a tiny model with its tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    tiny_model(LlamaConfig(**SIZES)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def settings(tmp_path):
    def made(**more):
        return ORPOConfig(
            **{
                "output_dir": str(tmp_path / "out"),
                "max_steps": 2,
                "per_device_train_batch_size": 2,
                "disable_tqdm": True,
            }
            | more
        )

    return made


REASONS = {
    "bf16": "TRL sets it to True in __post_init__, which fails without a GPU; here the device decides",
    "logging_nan_inf_filter": "a NaN loss is shown as one",
}
"""Fields whose default or behavior differs on purpose."""


def test_every_flag_of_trls_config_has_its_name_type_and_default(trl_orpo):
    from trl.experimental.orpo import ORPOConfig as TRLConfig

    theirs, ours = typing.get_type_hints(TRLConfig), typing.get_type_hints(ORPOConfig)
    mine = {f.name: f for f in fields(ORPOConfig)}
    assert len(fields(TRLConfig)) > 100
    for f in fields(TRLConfig):
        assert f.name in mine, f.name
        assert ours[f.name] == theirs[f.name], f.name
        if f.name != "logging_nan_inf_filter":
            assert (mine[f.name].default, mine[f.name].default_factory) == (f.default, f.default_factory), f.name
    assert {f.name for f in fields(TRLConfig) if mine[f.name].default != f.default} <= REASONS.keys()
    assert ORPOConfig("somewhere").output_dir == "somewhere"


def test_quick_start_of_trls_documentation(base, tmp_path, monkeypatch):
    """The code of the documentation with the import and the two names of the hub changed, and nothing else."""
    monkeypatch.chdir(tmp_path)
    rows(8).to_json("pairs.jsonl")
    from datasets import load_dataset

    from orpo_lite import ORPOConfig, ORPOTrainer

    model = AutoModelForCausalLM.from_pretrained(base)
    tokenizer = AutoTokenizer.from_pretrained(base)
    train_dataset = load_dataset("json", data_files="pairs.jsonl", split="train")

    training_args = ORPOConfig(output_dir="Qwen2-0.5B-ORPO")
    trainer = ORPOTrainer(model=model, args=training_args, processing_class=tokenizer, train_dataset=train_dataset)
    trainer.train()
    assert trainer.state.global_step == 3 and (tmp_path / "Qwen2-0.5B-ORPO" / "checkpoint-3").is_dir()


def test_a_whole_script(base, settings, tmp_path):
    """Model by name, no tokenizer, adapter, extra columns, callbacks, metrics, several held-out sets, predictions."""
    data = rows(6).map(lambda _, i: {"score": i / 2, "id": str(i)}, with_indices=True).with_format("torch")
    seen = []

    class Watch(TrainerCallback):
        def on_log(self, args, state, control, logs=None, model=None, processing_class=None, **kwargs):
            seen.append((processing_class is not None and model is not None, logs))

    trainer = ORPOTrainer(
        base,
        settings(
            eval_strategy="steps", eval_steps=1, logging_steps=1, generate_during_eval=True, max_completion_length=4
        ),
        train_dataset=data,
        eval_dataset=DatasetDict(a=data, b=data.select(range(2))),
        peft_config=LoraConfig(r=4),
        callbacks=[Watch()],
        compute_metrics=lambda p: {"pairs": len(p.predictions), "labels": len(p.label_ids)},
    )
    assert trainer.train().global_step == 2
    assert all(given for given, _ in seen) and any("rewards/margins" in logs for _, logs in seen)
    assert all(logs["tokens_per_second"] > 0 for _, logs in seen if "loss" in logs)
    found = trainer.evaluate()
    assert found["eval_a_pairs"] == found["eval_a_labels"] == 6 and found["eval_b_pairs"] == 2
    assert {"eval_a_loss", "eval_b_rewards/accuracies"} <= found.keys() and len(trainer.answers) == 2
    predicted = trainer.predict(data)
    assert predicted.predictions.shape[0] == 6 and "test_loss" in predicted.metrics
    trainer.save_model(str(tmp_path / "there"))
    assert (tmp_path / "there" / "adapter_model.safetensors").is_file() and (
        tmp_path / "there" / "tokenizer.json"
    ).is_file()
    again = ORPOTrainer(base, settings(max_steps=3), train_dataset=data, peft_config=LoraConfig(r=4))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-2"))
    assert again.state.global_step == 3


@pytest.mark.parametrize(
    ("kwargs", "check"),
    [
        (
            {"quantization_config": BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="float32")},
            lambda model: any(type(m).__name__ == "Linear4bit" for m in model.modules()),
        ),
        (
            '{"attn_implementation": "eager", "device_map": "auto"}',
            lambda model: model.config._attn_implementation == "eager",
        ),
        ({"torch_dtype": "bfloat16"}, lambda model: model.get_input_embeddings().weight.dtype == torch.bfloat16),
    ],
    ids=["4bit", "json", "torch_dtype"],
)
def test_models_by_name_with_model_init_kwargs(base, settings, kwargs, check):
    args = settings(model_init_kwargs=kwargs, max_steps=1)
    trainer = ORPOTrainer(base, args, train_dataset=rows(4), peft_config=LoraConfig(r=4, target_modules="all-linear"))
    assert check(trainer.model)
    trainer.train()


@pytest.mark.parametrize("precision", [{"bf16": True}, {"fp16": True}, {"tf32": True}, {}], ids=str)
def test_precision_that_the_machine_lacks_is_changed_aloud(precision, base, settings, caplog):
    if torch.cuda.is_available():
        pytest.skip("for machines without a GPU")
    trainer = ORPOTrainer(base, settings(max_steps=1, **precision), train_dataset=rows(4))
    trainer.train()
    assert not trainer.args.bf16 and not trainer.args.tf32
    assert not {"bf16", "tf32"} & precision.keys() or any(next(iter(precision)) in line for line in caplog.messages)


def test_custom_collators_get_trls_rows_with_all_columns(base, settings):
    from trl.experimental.utils import DPODataCollatorWithPadding

    seen = []

    class Mine(DPODataCollatorWithPadding):
        def __call__(self, features):
            seen.extend(features)
            return super().__call__(features)

    data = rows(5).map(lambda _, i: {"score": float(i)}, with_indices=True)
    found = {}
    for collator in (None, Mine(pad_token_id=1)):
        trainer = ORPOTrainer(base, settings(seed=3), collator, train_dataset=data, eval_dataset=data)
        trainer.train()
        found[collator is None] = (trainer.state.log_history[-1]["train_loss"], trainer.evaluate()["eval_loss"])
    assert found[False] == pytest.approx(found[True], abs=1e-5)
    assert {row["score"] for row in seen} == {0.0, 1.0, 2.0, 3.0, 4.0}
    one = seen[0]
    start = len(one["prompt_input_ids"])
    assert (
        one["chosen_labels"][:start] == [-100] * start
        and one["chosen_labels"][start:] == one["chosen_input_ids"][start:]
    )
    given = data[int(one["score"])]
    assert (one["chosen"], one["prompt"]) == (given["chosen"], given["prompt"])


def test_overriding_what_nothing_calls_is_refused():
    with pytest.raises(TypeError, match="Mine overrides get_batch_loss_metrics, odds_ratio_loss.*compute_loss"):

        class Mine(ORPOTrainer):
            def odds_ratio_loss(self, *logps): ...

            def get_batch_loss_metrics(self, *batch): ...


def test_a_subclass_with_a_loss_of_its_own(base, settings):
    class Doubled(ORPOTrainer):
        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            loss, metrics = super().compute_loss(model, inputs, True, num_items_in_batch)
            self.log({"plain": loss.item(), "margin": metrics["rewards/margins"]})
            return 2 * loss

    trainer = Doubled(base, settings(logging_steps=1, beta=0.3, max_steps=1), train_dataset=rows(4))
    trainer.args.beta = 0.5
    trainer.train()
    own, log = trainer.state.log_history[:2]
    assert log["loss"] == pytest.approx(2 * own["plain"], abs=1e-4)
    assert log["rewards/margins"] == pytest.approx(own["margin"])
    assert own["plain"] == pytest.approx(log["nll_loss"] - 0.5 * log["log_odds_ratio"], abs=1e-5)


def test_fields_of_older_versions_are_refused_by_name(settings):
    with pytest.raises(TypeError, match="evaluation_strategy"):
        settings(evaluation_strategy="no")
    assert settings(max_prompt_length=64).max_prompt_length == 64
    with pytest.raises(TypeError, match="processing_class"):
        ORPOTrainer("x", settings(), train_dataset=rows(2), tokenizer=None)


def test_model_card_and_push(base, settings, tmp_path, monkeypatch):
    """As TRL's scripts push, but private, without checkpoints and pickles, and with the token nowhere."""
    with HubServer() as hub:
        monkeypatch.setattr(constants, "ENDPOINT", hub.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
        args = settings(
            push_to_hub=True, hub_model_id="me/mine", hub_token=hub.token, hub_strategy="all_checkpoints",
            save_strategy="steps", save_steps=1, max_steps=2,
        )  # fmt: skip
        trainer = ORPOTrainer(base, args, train_dataset=rows(4), eval_dataset=rows(4), peft_config=LoraConfig(r=4))
        trainer.train()
        trainer.evaluate()
        trainer.save_model()
        (tmp_path / "out" / "notes.txt").write_text("mine")
        trainer.push_to_hub(dataset_name="org/pairs", tags="demo")
        files, token = dict(hub.repos["me/mine"].files), hub.token.encode()
        assert hub.repos["me/mine"].private and not any(token in content for content in files.values())
    assert not [path for path in tmp_path.rglob("*") if path.is_file() and token in path.read_bytes()]
    assert list(tmp_path.rglob("checkpoint-*")) and not list(tmp_path.rglob("training_args.bin"))
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "README.md"} <= files.keys()
    assert not {name for name in files if "/" in name or not name.endswith((".json", ".safetensors", ".md", ".jinja", ".gitattributes"))}  # fmt: skip
    card = ModelCard((tmp_path / "out" / "README.md").read_text("utf-8"))
    assert card.data.datasets == ["org/pairs"] and {"demo", "orpo", "lora"} <= set(card.data.tags)
    assert card.data.library_name == "peft" and "# mine" in card.text and "- Pytorch 2" in card.text
    assert str(base) not in card.content
    assert files["README.md"].decode("utf-8").startswith("---")
    (tmp_path / "out" / "chat_template.jinja").write_text("{# hf_Secret0123456789abcdefghij #}")
    monkeypatch.setattr(type(trainer), "save_model", lambda *_, **__: None)
    with pytest.raises(RequestError, match=r"chat_template.jinja, line 1: looks like a Hugging Face token"):
        trainer.push_to_hub()


def test_arguments_of_another_library_are_refused_by_name(base, tmp_path):
    with pytest.raises(
        TypeError, match="args is a transformers.training_args.TrainingArguments, expected orpo_lite.ORPO"
    ):
        ORPOTrainer(base, TrainingArguments(str(tmp_path)), train_dataset=rows(4))
