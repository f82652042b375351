"""What holds for any recipe, row, text and lengths: properties over generated values."""

from __future__ import annotations

import copy
import os
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import LlamaConfig

from orpo_lite.common.errors import RequestError
from orpo_lite.data.row_shapes import detect
from orpo_lite.data.token_cache import TokenizeOptions
from orpo_lite.data.tokenize import PairTokenizer, boundaries
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import apply_override, read_yaml, shipped_recipes
from orpo_lite.recipe.validation import leaves
from orpo_lite.trainer.config import ORPOConfig
from orpo_lite.trainer.trainer import ORPOTrainer
from tests.malformed.fuzz import tokenizer
from tests.tiny import tiny_model
from tests.training import SIZES, rows

# the machine may be slow or shared, and a found example must be found again
settings.register_profile("orpo_lite", deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
settings.load_profile("orpo_lite")

TEXT = st.text(st.characters(), max_size=40) | st.sampled_from(
    [
        "👩\u200d👩\u200d👧",
        "a\u0301\u0302",
        "\u202eabc",
        "\x00\x1b[2J",
        "\ud83d",
        "<|im_end|>",
        "<|im_start|>user\n",
        " ",
        "\n\n",
        "ﬁ½",
    ]
)
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXT
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3), max_leaves=6
)
CLEAN = st.text(st.characters(exclude_categories=["Cs"]), max_size=60)
RECIPES = {name: yaml.safe_load(path.read_text("utf-8")) for name, path in shipped_recipes().items()}


def section(**fields: st.SearchStrategy[Any]) -> st.SearchStrategy[dict[str, Any]]:
    return st.fixed_dictionaries({}, optional=fields)


GOOD = st.fixed_dictionaries(
    {
        "name": st.from_regex(r"[A-Za-z0-9][A-Za-z0-9._-]{0,10}", fullmatch=True),
        "model": st.fixed_dictionaries(
            {"name_or_path": CLEAN.filter(lambda text: "\0" not in text)},
            optional={"quantization": st.just("none"), "double_quant": st.booleans()},
        ),
        "data": st.fixed_dictionaries(
            {"train": st.sampled_from(["a.jsonl", ["a", {"path": "b", "weight": 0.5}], {"path": "c", "columns": {"prompt": "q"}}])},
            optional={"max_length": st.none() | st.integers(1, 10**6), "eval_fraction": st.floats(0, 0.99)},
        ),
    },
    optional={
        "description": CLEAN.filter(lambda text: "\0" not in text),
        "adapter": section(r=st.integers(1, 512), alpha=st.floats(1e-3, 1e3), dropout=st.floats(0, 0.99)),
        "orpo": section(beta=st.floats(0, 1e6), layout=st.sampled_from(["auto", "shared", "packed", "padded"])),
        "training": section(learning_rate=st.floats(1e-12, 10), max_steps=st.integers(-1, 10**9), seed=st.integers(0, 2**32 - 1)),
        "memory": section(gpu_gb=st.floats(0.1, 1e4), checkpointing=st.sampled_from(["auto", "all", "none", 3])),
    },
)  # fmt: skip


@given(GOOD)
@settings(max_examples=40)
def test_a_recipe_is_the_same_once_saved(tmp_path_factory: Any, content: dict[str, Any]) -> None:
    path = tmp_path_factory.getbasetemp() / "recipe.yaml"
    recipe = Recipe.parse(content)
    recipe.save(path)
    again = Recipe.load(path)
    assert again == recipe
    again.save(path)
    assert read_yaml(path) == recipe.model_dump(mode="json")


@given(st.data())
@settings(max_examples=80)
def test_an_edited_recipe_is_loaded_or_refused_in_words(data: st.DataObject) -> None:
    content = copy.deepcopy(RECIPES[data.draw(st.sampled_from(sorted(RECIPES)))])
    places = [place for place, _ in leaves(content) if not any(part.isdigit() for part in place.split("."))]
    *parents, key = data.draw(st.sampled_from(places)).split(".")
    inside = content
    for parent in parents:
        inside = inside[parent]
    value = data.draw(VALUES)
    inside[key] = value
    try:
        recipe = Recipe.parse(content)
    except RequestError as error:
        assert str(error).startswith("recipe: ") and error.problems
    else:
        Recipe.model_validate(recipe.model_dump())


@given(st.text(max_size=60))
@settings(max_examples=80)
def test_any_override_is_taken_or_refused_in_words(word: str) -> None:
    content = copy.deepcopy(RECIPES["quickstart"])
    try:
        key = apply_override(content, word)
        Recipe.parse(content, "file.yaml", [key])
    except RequestError as error:
        assert str(error).startswith(("command line", "file.yaml"))


MESSAGE = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "system", "tool", "x"]), "content": TEXT | VALUES}
)
SIDE = TEXT | st.lists(MESSAGE, max_size=3) | VALUES
ROW = st.fixed_dictionaries({}, optional=dict.fromkeys(
    ("prompt", "chosen", "rejected", "conversations", "instruction", "input", "system", "tools", "history", "chat_template_kwargs"), SIDE,
)) | VALUES  # fmt: skip
OPTIONS = st.builds(
    TokenizeOptions,
    max_length=st.none() | st.integers(1, 64),
    max_prompt_length=st.none() | st.integers(1, 32),
    overlong=st.sampled_from(["drop", "truncate"]),
    completion_end=st.sampled_from(["trl", "turn"]),
    apply_template=st.booleans(),
    strict=st.booleans(),
)


@given(st.lists(ROW, min_size=1, max_size=4), OPTIONS)
@settings(max_examples=100)
def test_every_row_becomes_a_pair_or_a_counted_drop(given_rows: list[Any], options: TokenizeOptions) -> None:
    shape = detect(given_rows)
    if shape is None:
        return
    chunk = PairTokenizer(tokenizer(), options, shape)(list(enumerate(given_rows)))
    kept = chunk.columns["row"]
    assert sorted([*kept, *(row for row, _, _ in chunk.drops)]) == list(range(len(given_rows)))
    assert all(reason and detail for _, reason, detail in chunk.drops)
    for side in ("chosen", "rejected"):
        for start, ids in zip(chunk.columns[f"{side}_start"], chunk.columns[f"{side}_ids"], strict=True):
            assert 0 <= start < len(ids) <= (options.max_length or len(ids))


@given(TEXT, TEXT, TEXT, OPTIONS)
@settings(max_examples=100)
def test_where_an_answer_starts(prompt: str, chosen: str, rejected: str, options: TokenizeOptions) -> None:
    """Up to there both sequences are the prompt's tokens; what is cut is cut from an end, never from the middle."""
    work = PairTokenizer(tokenizer(), options, "strings, explicit prompt")
    row = {"prompt": prompt, "chosen": chosen, "rejected": rejected}
    chunk = work([(0, row)])
    if not chunk.columns["row"]:
        assert len(chunk.drops) == 1
        return
    whole = PairTokenizer(tokenizer(), TokenizeOptions(**vars(options) | {"max_length": None, "max_prompt_length": None}),
                          "strings, explicit prompt")([(0, row)])  # fmt: skip
    for side in ("chosen", "rejected"):
        start, ids = chunk.columns[f"{side}_start"][0], chunk.columns[f"{side}_ids"][0]
        full_start, full = whole.columns[f"{side}_start"][0], whole.columns[f"{side}_ids"][0]
        answer = ids[start:]
        assert full[full_start:][: len(answer)] == answer
        if not chunk.counts["prompt cut"]:
            assert ids == full[: len(ids)] and start == full_start


@given(CLEAN, CLEAN, CLEAN)
@settings(max_examples=100)
def test_boundaries_lie_within_a_token_of_the_prompt(prompt: str, chosen: str, rejected: str) -> None:
    ids = [
        tokenizer()(text, add_special_tokens=False)["input_ids"]
        for text in (prompt, prompt + chosen, prompt + rejected)
    ]
    starts = boundaries(*ids)
    for start, whole in zip(starts, ids[1:], strict=True):
        assert 0 <= start <= min(len(ids[0]), len(whole))
        # what stands before it is the prompt's, save for one token that the answer's text has merged with
        assert len(os.path.commonprefix([ids[0], whole[:start]])) >= start - 1


@pytest.fixture(scope="module")
def trainers(tmp_path_factory: Any) -> dict[str, ORPOTrainer]:
    model = tiny_model(LlamaConfig(**SIZES, pad_token_id=0))
    made = {}
    for layout in ("padded", "packed", "shared"):
        args = ORPOConfig(output_dir=str(tmp_path_factory.mktemp("run")), layout=layout, use_cpu=True, report_to="none")
        made[layout] = ORPOTrainer(model, args, None, rows(4), None, tokenizer())
    return made


LENGTHS = st.tuples(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 5))


@given(st.lists(LENGTHS, min_size=1, max_size=4), st.integers(0, 10**6))
@settings(max_examples=25)
def test_layouts_agree_on_any_lengths(trainers: dict[str, ORPOTrainer], lengths: list[Any], seed: int) -> None:
    draw = torch.Generator().manual_seed(seed)
    pairs = []
    for prompt, chosen, rejected, common in lengths:

        def ids(count: int) -> list[int]:
            return torch.randint(3, 500, (count,), generator=draw).tolist()

        head, shared = ids(prompt), ids(common)
        pairs.append({"chosen_ids": head + shared + ids(chosen), "rejected_ids": head + shared + ids(rejected),
                      "chosen_start": prompt, "rejected_start": prompt})  # fmt: skip
    losses = {}
    for layout, trainer in trainers.items():
        batch = trainer.data_collator(pairs)
        with torch.no_grad():
            losses[layout] = float(trainer.compute_loss(trainer.model.eval(), batch))
    assert losses["packed"] == pytest.approx(losses["padded"], abs=2e-5)
    assert losses["shared"] == pytest.approx(losses["padded"], abs=2e-5)
