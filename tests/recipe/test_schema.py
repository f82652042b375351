"""The recipe schema: load, override, validate, save, and the JSON Schema for editors."""

import re
import shlex
import subprocess
import sys
from enum import Enum
from typing import get_args, get_type_hints

import pytest
import yaml
from transformers import TrainingArguments

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import RecipeError, apply_override, find_recipe, read_yaml, shipped_recipes
from orpo_lite.recipe.training_fields import check_training_field, choices_of, declared_fields, training_fields
from orpo_lite.recipe.validation import OTHER_NAMES, fields_by_name

SHIPPED = shipped_recipes()
REQUIRED = {
    "quickstart",
    "smollm2-135m-qlora",
    "qwen2-0.5b-ultrafeedback",
    "qwen3-4b-qlora",
    "llama-3.2-3b-qlora",
    "mistral-qlora",
    "mistral-qlora-t4",
    "llama-3-8b-qlora",
    "qwen2.5-7b-qlora",
    "gemma-2-9b-qlora",
    "phi-2-orpo",
    "llama-2-7b-orpo",
    "mixtral-8x7b",
}


def content(**sections):
    """The shortest valid recipe, with sections replaced."""
    return {"name": "short", "model": {"name_or_path": "org/model"}, "data": {"train": "pairs.jsonl"}} | sections


def problems(*overrides, **sections):
    """What is wrong with a recipe, as a list of lines."""
    recipe = content(**sections)
    for word in overrides:
        apply_override(recipe, word)
    with pytest.raises(RecipeError) as caught:
        Recipe.parse(recipe)
    return caught.value.problems


@pytest.fixture
def written(tmp_path):
    """Writes a recipe and gives its path."""

    def write(text, name="mine.yaml"):
        path = tmp_path / name
        path.write_text(text if isinstance(text, str) else yaml.safe_dump(text), "utf-8")
        return path

    return write


def test_the_promised_recipes_are_shipped():
    assert set(SHIPPED) >= REQUIRED


@pytest.mark.parametrize("name", SHIPPED)
def test_shipped_recipe_says_what_it_is(name):
    recipe, text = Recipe.load(name), SHIPPED[name].read_text("utf-8")
    header = text[: re.search(r"^[a-z]", text, re.MULTILINE).start()]
    assert recipe.name == name
    assert recipe.description and recipe.needs
    assert f"--recipe {name}" in header, "the header shows the command"
    assert str(recipe.folder).replace("\\", "/") == f"outputs/{name}"


@pytest.mark.parametrize("name", sorted(set(SHIPPED) - {"quickstart"}))
def test_shipped_recipe_states_card_provenance_and_result(name):
    text = SHIPPED[name].read_text("utf-8")
    for part in ("# Card", "# Where the numbers come from", "# Result: "):
        assert part in text
    recipe = Recipe.load(name)
    assert recipe.data.overlong == "drop" and recipe.training["report_to"] == "none"
    # TRL's default of 1e-6 hardly moves a LoRA adapter
    assert recipe.training["learning_rate"] >= 1e-5


def test_the_papers_betas():
    betas = {name: Recipe.load(name).orpo.beta for name in ("mistral-qlora", "phi-2-orpo", "llama-2-7b-orpo")}
    assert betas == {"mistral-qlora": 0.1, "phi-2-orpo": 0.25, "llama-2-7b-orpo": 0.2}


@pytest.mark.parametrize(
    ("word", "where", "value"),
    [
        ("training.learning_rate=5e-6", ("training", "learning_rate"), 5e-6),  # YAML 1.1 reads 5e-6 as text
        ("training.learning_rate=0.00005", ("training", "learning_rate"), 5e-5),
        ("training.max_steps=3", ("training", "max_steps"), 3),
        ("training.eval_strategy=no", ("training", "eval_strategy"), "no"),  # and no as false
        ("training.report_to=[wandb, tensorboard]", ("training", "report_to"), ["wandb", "tensorboard"]),
        ("orpo.beta=1e-1", ("orpo", "beta"), 0.1),
        ("adapter.target_modules=[q_proj, v_proj]", ("adapter", "target_modules"), ["q_proj", "v_proj"]),
        ("adapter.loraplus_lr_ratio=16", ("adapter", "loraplus_lr_ratio"), 16.0),
        ("data.max_length=null", ("data", "max_length"), None),
        ("data.template_kwargs.enable_thinking=false", ("data", "template_kwargs"), {"enable_thinking": False}),
        ("model.revision=", ("model", "revision"), None),
        ("memory.checkpointing=12", ("memory", "checkpointing"), 12),
        ("description=a = b", ("description",), "a = b"),
    ],
)
def test_override(written, word, where, value):
    found = Recipe.load(written(content()), [word])
    for key in where:
        found = found[key] if isinstance(found, dict) else getattr(found, key)
    assert found == value and type(found) is type(value)


def test_later_overrides_win_and_sections_come_back_from_null(written):
    path = written(content(adapter=None, model={"name_or_path": "a/b", "quantization": "none"}))
    assert Recipe.load(path).adapter is None
    assert Recipe.load(path, ["adapter.r=4", "adapter.r=8"]).adapter.r == 8


@pytest.mark.parametrize("word", ["training.learning_rate", "=3", "name.x=1", "data.train=[a"])
def test_override_that_cannot_be_read(written, word):
    with pytest.raises(RecipeError, match=re.escape(word)):
        Recipe.load(written(content()), [word])


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("data.template_kwargs={enable_thinking:false}", "'data.template_kwargs={enable_thinking: false}', quotes included"),
        ("data.columns={prompt:question,chosen:a}", "'data.columns={prompt: question,chosen: a}'"),
        ("training.lr_scheduler_kwargs={num_cycles:3}", "'training.lr_scheduler_kwargs={num_cycles: 3}'"),
        ("data.train=[{path:my.jsonl}, b]", "'data.train=[{path: my.jsonl}, b]'"),
        ("evaluation={rule: {chosen:a, rejected: b}}", "'evaluation={rule: {chosen: a, rejected: b}}'"),
        ("data.template_kwargs={enable_thinking}", "'enable_thinking' is a key without a value: write 'key: value'"),
        ("data.template_kwargs={enable_thinking:", "put the whole of it in quotes"),  # the shell cut it at the space
        ("data.columns=prompt:question", "a mapping, on the command line in quotes"),  # the shell took the braces
        ("data.template_kwargs=enable_thinking:false", "with a space after each colon: '{key: value}'"),
    ],
)  # fmt: skip
def test_mapping_without_a_space_after_its_colon_says_what_to_write(written, word, told):
    with pytest.raises(RecipeError) as caught:
        Recipe.load(written(content()), [word])
    assert told in str(caught.value) and str(caught.value).startswith(f"command line: {word.partition('=')[0]}")
    if told.startswith("'") and "quotes" in told:  # what it says to write is taken
        right = shlex.split(told.removesuffix(", quotes included"))[0]
        assert Recipe.load(written(content()), [right]).data.template_kwargs == {"enable_thinking": False}


@pytest.mark.parametrize("value", ["{a: null}", "{a: ~}", '{"a":null}', "a: null"])
def test_mapping_with_null_in_it_is_taken(written, value):
    assert Recipe.load(written(content()), [f"data.template_kwargs={value}"]).data.template_kwargs == {"a": None}


@pytest.mark.parametrize(
    ("given", "paths", "weights"),
    [
        ("a.jsonl", ["a.jsonl"], [1.0]),
        ({"path": "a.jsonl", "weight": 2}, ["a.jsonl"], [2.0]),
        (["a.jsonl", {"path": "org/set", "split": "test", "weight": 0.5}], ["a.jsonl", "org/set"], [1.0, 0.5]),
    ],
)
def test_data_sources(given, paths, weights):
    sources = Recipe.parse(content(data={"train": given})).data.train
    assert [source.path for source in sources] == paths
    assert [source.weight for source in sources] == weights


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.quantisation=nf4", "did you mean model.quantization?"),
        ("orpo.betta=0.1", "did you mean orpo.beta?"),
        ("data.train=[{pth: a.jsonl}]", "data.train.0.pth: unknown key (did you mean data.train.0.path?)"),
        ("evaluation.rule={chosen: a, rejected: b, rejectd: c}", "did you mean evaluation.rule.rejected?"),
        ("trainin.max_steps=1", "trainin: unknown key (did you mean training.max_steps?)"),
        ("training.learning_rat=1", "did you mean training.learning_rate?"),
        ("training.warmup_ratio=0.1", "unknown key (did you mean training.warmup_steps?)"),
    ],
)
def test_unknown_key_names_the_nearest(word, told):
    assert any(told in line for line in problems(word))


@pytest.mark.parametrize(
    ("word", "told"),
    [
        ("model.quantization=nf5", ("model.quantization", "'nf5'", "'nf4'")),
        ("model.dtype=bf16", ("model.dtype", "'bf16'", "'bfloat16'")),
        ("adapter.r=0", ("adapter.r", "found 0")),
        ("adapter.init_lora_weights=pissa_niter_4", ("adapter.init_lora_weights", "'pissa_niter_4'", "'gaussian'")),
        ("adapter.init_lora_weights=pisa", ("adapter.init_lora_weights", "'pisa'", "'gaussian'")),
        ("orpo.beta=.nan", ("orpo.beta", "finite")),
        ("orpo.beta=-1", ("orpo.beta", "found -1")),
        ("data.train=[]", ("data.train", "at least 1")),
        ("data.train=[{path: a, weight: 0}]", ("data.train.0.weight", "found 0")),
        ("data.columns={promt: x}", ("data.columns", "'promt'", "'prompt'")),
        ("data.eval_fraction=1.5", ("data.eval_fraction", "1.5")),
        ("memory.checkpointing=some", ("memory.checkpointing", "'some'", "'all'")),
        ("name=../elsewhere", ("name", "'../elsewhere'")),
        ("training.learning_rate=fast", ("training.learning_rate", "'fast'", "number")),
        ("training.learning_rate=-1", ("training.learning_rate", "-1", "greater than 0")),
        ("training.learning_rate=.inf", ("training.learning_rate", "finite")),
        ("training.lr_scheduler_type=coosine", ("training.lr_scheduler_type", "did you mean cosine?")),
        ("training.eval_strategy=step", ("training.eval_strategy", "did you mean steps?")),
        ("training.optim=adam", ("training.optim", "'adam'", "adamw_torch")),
        ("training.max_steps=1.5", ("training.max_steps", "1.5")),
    ],
)
def test_wrong_value_says_field_found_and_expected(word, told):
    lines = problems(word)
    assert any(all(part in line for part in told) for line in lines), lines


def test_missing_fields_are_named():
    with pytest.raises(RecipeError) as caught:
        Recipe.parse({"name": "x", "data": {}})
    assert any(line.startswith("model: missing") for line in caught.value.problems)
    assert any(line.startswith("data.train: missing") for line in caught.value.problems)


def test_all_errors_at_once(written):
    path = written(
        content(
            model={"name_or_path": "a/b", "quantisation": "nf4"},
            orpo={"beta": "much"},
            training={"learning_rate": "fast", "lerning_rate": 1, "optim": "adam"},
        )
    )
    with pytest.raises(RequestError) as caught:
        Recipe.load(path, ["adapter.r=0"])
    message = str(caught.value)
    assert str(path) in message and "6 problems" in message
    for field in ("model.quantisation", "orpo.beta", "learning_rate", "lerning_rate", "training.optim", "adapter.r"):
        assert field in message


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["adapter=null"], "model.quantization is nf4"),
        (["adapter=null", "model.quantization=fp4"], "changes the base weights"),
        (["data.max_prompt_length=1024", "data.max_length=1024"], "no room for an answer"),
    ],
)
def test_sections_that_contradict_each_other(words, told):
    assert any(told in line for line in problems(*words))


@pytest.mark.parametrize("text", ["model: [", "- a\n- b\n", "just words", ""])
def test_file_that_is_no_recipe(written, text):
    path = written(text)
    with pytest.raises(RecipeError, match=re.escape(str(path))):
        Recipe.load(path)


def test_yaml_cannot_run_code(written):
    with pytest.raises(RecipeError, match="not readable as YAML"):
        Recipe.load(written("model: !!python/object/apply:os.getcwd []\n"))


def test_unknown_name_lists_and_guesses(tmp_path, monkeypatch):
    with pytest.raises(RecipeError, match=r"did you mean mistral-qlora\?.*shipped: .*quickstart"):
        Recipe.load("mistral-qlra")
    with pytest.raises(RecipeError, match="no such file"):
        Recipe.load(tmp_path / "absent.yaml")
    with pytest.raises(RecipeError, match="is it a run folder"):
        Recipe.load(tmp_path)
    # a folder of the recipe's name, such as outputs/ holds, does not hide the shipped recipe
    (tmp_path / "mistral-qlora").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_recipe("mistral-qlora") == SHIPPED["mistral-qlora"]


def test_name_comes_from_the_file(written):
    nameless = content()
    del nameless["name"]
    assert Recipe.load(written(nameless, "my-run.yaml")).name == "my-run"


@pytest.mark.parametrize("name", SHIPPED)
def test_saved_recipe_loads_back_from_its_run_folder(name, tmp_path):
    recipe = Recipe.load(name, ["training.learning_rate=5e-6", "data.train=[a.jsonl, {path: b, weight: 0.5}]"])
    recipe.save(tmp_path / "recipe.yaml")
    assert Recipe.load(tmp_path) == recipe
    saved = read_yaml(tmp_path / "recipe.yaml")
    assert saved["training"]["learning_rate"] == 5e-6
    # every field is written, so that new defaults in a later version do not change an old run
    assert set(saved) == set(Recipe.model_fields) and saved["orpo"].keys() == type(recipe.orpo).model_fields.keys()


def test_listing_recipes_imports_no_torch():
    script = "import sys, orpo_lite.recipe.loading as r; r.shipped_recipes(); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


MEANT = {  # what is typed -> the field, and the value where the name implies one
    "lr": "training.learning_rate", "learning_rate": "training.learning_rate", "epochs": "training.num_train_epochs",
    "num_epochs": "training.num_train_epochs", "batch_size": "training.per_device_train_batch_size",
    "micro_batch_size": "training.per_device_train_batch_size", "output_dir": "training.output_dir", "lora_r": "adapter.r",
    "output.dir": "training.output_dir", "run.output_dir": "training.output_dir", "lora.r": "adapter.r", "lora_rank": "adapter.r",
    "lora.alpha": "adapter.alpha", "lora_alpha": "adapter.alpha", "model.base_model": "model.name_or_path",
    "load_in_4bit": "model.quantization=nf4", "model.load_in_8bit": "model.quantization=nf4", "cutoff_len": "data.max_length",
    "sequence_len": "data.max_length", "training.max_seq_length": "data.max_length", "base_model": "model.name_or_path",
    "model_name_or_path": "model.name_or_path", "dataset": "data.train", "beta": "orpo.beta", "bf16": "model.dtype=bfloat16",
    "training.lr": "training.learning_rate", "training.lora_alpha": "adapter.alpha", "Batch-Size": "training.per_device_train_batch_size",
    "max_lenght": "data.max_length", "training.learning_rat": "training.learning_rate", "data": "data.train",
}  # fmt: skip
VALUES = {
    "training.output_dir": "a b",
    "data.max_length": "4096",
    "model.name_or_path": "a/b",
    "data.train": "it's.jsonl",
    "training.learning_rate": "1e-4",
}


@pytest.mark.parametrize("recipe", ["quickstart", "mistral-qlora"])
@pytest.mark.parametrize("name", MEANT)
def test_a_word_by_another_tool_s_name_gets_the_field_to_paste(name, recipe):
    field, _, implied = MEANT[name].partition("=")
    word = f"{name}={'true' if implied else VALUES.get(field, '8')}"
    with pytest.raises(RecipeError) as caught:
        Recipe.load(recipe, [word])
    said = str(caught.value)
    assert said.startswith("command line: ") and "recipes" not in said and "yaml" not in said
    (right,) = shlex.split(re.search(r"\(did you mean (.+)\?\)$", said)[1])
    assert right == (MEANT[name] if implied else f"{field}={word.partition('=')[2]}")
    Recipe.load(recipe, [right])  # what it says is taken


def test_every_other_name_stands_for_a_field_and_is_none_itself():
    content = Recipe.load("quickstart").model_dump()
    for field, names in OTHER_NAMES.items():
        section, name = field.partition("=")[0].split(".")
        assert name in (training_fields() if section == "training" else content[section]), field
        for other in names:
            assert fields_by_name(Recipe)[other] == field, "one field for a name"
        word = field if "=" in field else None
        assert word is None or Recipe.load("quickstart", [word])


def test_a_file_s_unknown_keys_are_the_file_s_and_get_the_field_without_a_value(written):
    path = written(content(lr=1e-4, training={"batch_size": 3}, output={"dir": "x"}))
    with pytest.raises(RecipeError) as caught:
        Recipe.load(path, ["epochs=2", "bf16=false"])
    for line in (f"{path}: 5 problems", "lr: unknown key (did you mean training.learning_rate?)",
                 "training.batch_size: unknown key (did you mean training.per_device_train_batch_size?)",
                 "output: unknown key (did you mean training.output_dir?)",
                 "command line, epochs: unknown key (did you mean training.num_train_epochs=2?)",
                 "command line, bf16: unknown key (did you mean model.dtype?)"):  # fmt: skip
        assert line in str(caught.value)


def test_no_recipe_publishes():
    """Every field of transformers by which a run would send something, whatever this version has of them."""
    names = {name for name in training_fields() if "hub" in name}
    assert {"push_to_hub", "hub_model_id", "hub_token"} <= names
    for name in names:
        with pytest.raises(ValueError, match=f"training.{name}: .*leave it out"):
            check_training_field(name, "me/x")
    assert check_training_field("push_to_hub", False) is False


def test_training_fields_read_off_the_source_are_transformers_own():
    """Names, plain types and choices of TrainingArguments, which recipes are checked by without importing it."""
    hints = {key: hint for key, hint in get_type_hints(TrainingArguments).items() if not key.startswith("_")}
    found = declared_fields()
    assert found.keys() == hints.keys()
    for key, hint in hints.items():
        enums = [kind for kind in get_args(hint) if isinstance(kind, type) and issubclass(kind, Enum)]
        if enums:
            assert choices_of(key) == [choice.value for choice in enums[0]], key
        elif key not in ("parallelism_config", "debug"):  # of classes that are not imported
            assert found[key] == hint, key
        listed = TrainingArguments.__dataclass_fields__[key].metadata.get("choices")
        assert not listed or set(choices_of(key)) <= set(listed), key


def test_streaming_was_removed():
    """Old run folders say `streaming: false`, which means nothing anymore; true would."""
    assert not hasattr(Recipe.load("quickstart", ["data.streaming=false"]).data, "streaming")
    for word in ("data.streaming=true", "adapter.exclude_modules=[lm_head]", "adapter.rank_pattern={q_proj: 4}"):
        field = word.partition("=")[0]
        with pytest.raises(RequestError, match=f"{field}: unknown key since an older version: remove it.* CHANGELOG"):
            Recipe.load("quickstart", [word])


def test_a_recipe_is_loaded_and_checked_without_torch():
    script = (
        "import sys; from orpo_lite.recipe import Recipe; from orpo_lite.common import console; "
        "Recipe.load('mistral-qlora', ['training.optim=adamw_8bit']); "
        "print(*{'torch', 'transformers', 'datasets', 'numpy'} & sys.modules.keys())"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert not done.stdout.strip()
