"""What transformers refuses in the training section is the recipe's error, with the field's name and exit status 2."""

import pytest

from orpo_lite.common.errors import RequestError
from orpo_lite.recipe import Recipe
from orpo_lite.train import pipeline as train

CASES = [
    (["training.logging_steps=0"], ["training.logging_steps: found 0", "greater than 0"]),
    (["training.save_steps=0"], ["training.save_steps: found 0", "greater than 0"]),
    (['training.lr_scheduler_kwargs={"foo": 1}'], ["training.lr_scheduler_kwargs (found {'foo': 1})", "'foo'"]),
    (["training.lr_scheduler_kwargs='{'"], ["training.lr_scheduler_kwargs (found '{')"]),
    (
        ["training.load_best_model_at_end=true", "training.eval_strategy=steps", "training.save_strategy=steps",
         "training.eval_steps=3", "training.save_steps=4"],
        ["training.load_best_model_at_end (found True)", "saving steps", "found 4", "multiple of 3"],
    ),
    (
        ["training.load_best_model_at_end=true", "training.eval_strategy=no", "training.save_strategy=steps"],
        ["training.load_best_model_at_end (found True)", "strategy to match"],
    ),
    (['training.accelerator_config={"x": 1}'], ["training.accelerator_config (found {'x': 1})"]),
    (["training.train_sampling_strategy=group_by_length"], ["training.train_sampling_strategy", "random, sequential"]),
]  # fmt: skip


@pytest.mark.parametrize(("words", "said"), CASES, ids=lambda x: x[0])
def test_the_field_is_named(words, said, tmp_path):
    with pytest.raises(RequestError) as caught:
        train.run(Recipe.load("quickstart", [*words, f"training.output_dir={tmp_path / 'run'}"]), dry_run=True)
    for one in said:
        assert one in str(caught.value)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    "schedule", ["linear", "cosine", "constant", "cosine_with_min_lr", "polynomial", "inverse_sqrt"]
)
def test_schedules_that_work_are_taken(schedule, tmp_path):
    from orpo_lite.trainer.config_from_recipe import checked_config

    kwargs = {"cosine_with_min_lr": {"min_lr": 1e-6}, "polynomial": {"power": 2.0}}.get(schedule, {})
    fields = {"output_dir": str(tmp_path), "lr_scheduler_type": schedule, "lr_scheduler_kwargs": kwargs}
    assert checked_config(fields, {}).lr_scheduler_type == schedule
