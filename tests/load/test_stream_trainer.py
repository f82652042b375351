"""Streaming data sets given to ORPOTrainer: read once to disk, as far as max_steps needs, and then trained on as a table."""

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import LlamaConfig

from orpo_lite import ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.data import TooManyDropped
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows


class Plain(IterableDataset):
    """A torch stream of rows that counts how often and how far it is read."""

    def __init__(self, given):
        self.given, self.passes, self.read = given, 0, 0

    def __iter__(self):
        self.passes += 1
        for row in self.given:
            self.read += 1
            yield row


def with_bad(count, seed=0):
    """Rows of which every fifth has no chosen answer."""
    return [row | {"chosen": None} if n % 5 == 3 else row for n, row in enumerate(rows(count, seed).to_list())]


def build(data, folder, tokenizer, evaluation=None, **options):
    torch.manual_seed(1)
    model = get_peft_model(tiny_model(LlamaConfig(**SIZES)), LoraConfig(r=4, target_modules="all-linear"))
    options = {"per_device_train_batch_size": 4, "max_steps": 5, "logging_steps": 1, "use_cpu": True, "gradient_checkpointing": False} | options  # fmt: skip
    return ORPOTrainer(model, config(folder, **options), None, data, evaluation, tokenizer)


def losses(trainer):
    return [log["loss"] for log in trainer.state.log_history if "loss" in log]


@pytest.mark.parametrize(("kind", "options"), [("datasets", {}), ("torch", {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2})])  # fmt: skip
def test_a_stream_trains_as_the_table_of_the_rows_it_needs(kind, options, tmp_path, tokenizer):
    given = with_bad(60)
    table = build(datasets.Dataset.from_list(given[:25]), tmp_path / "a", tokenizer, **options)
    stream = datasets.Dataset.from_list(given).to_iterable_dataset() if kind == "datasets" else Plain(given)
    streamed = build(stream, tmp_path / "b", tokenizer, **options)
    assert len(streamed.train_dataset) == 20 == len(table.train_dataset)  # 5 steps of 4 pairs
    assert streamed.train_dataset["chosen_ids"] == table.train_dataset["chosen_ids"]
    for trainer in (table, streamed):
        trainer.train()
    assert losses(streamed) == losses(table)
    report = streamed.drop_reports["train"]
    assert [drop.row for drop in report.drops][:5] == [3, 8, 13, 18, 23]
    if kind == "torch":
        assert stream.passes == 1 and stream.read == report.rows == 40  # two batches, since the first lacks the dropped
        assert "40 rows of the stream were read for 20 pairs" in str(report)


def test_resuming_reads_the_stream_again(tmp_path, tokenizer):
    given, options = with_bad(30), {"save_steps": 2, "save_strategy": "steps", "max_steps": 3}
    whole = build(Plain(given), tmp_path / "a", tokenizer, **options)
    whole.train()
    again = build(Plain(given), tmp_path / "b", tokenizer, **options)
    again.train(resume_from_checkpoint=str(tmp_path / "a" / "out" / "checkpoint-2"))
    assert losses(again)[-1] == losses(whole)[-1]


def test_a_short_stream_is_repeated_like_any_data_set(tmp_path, tokenizer):
    trainer = build(Plain(rows(5)), tmp_path, tokenizer, max_steps=2)
    trainer.train()
    assert len(trainer.train_dataset) == 5 and trainer.state.global_step == 2


def test_max_steps_is_required(tmp_path, tokenizer):
    with pytest.raises(RequestError, match="max_steps: found -1, expected a number above 0"):
        build(Plain(rows(9)), tmp_path, tokenizer, max_steps=-1)


def test_more_than_half_dropped_is_an_error(tmp_path, tokenizer):
    good, bad = rows(4).to_list(), rows(1)[0] | {"chosen": None}
    with pytest.raises(TooManyDropped, match="train: 5 of 9 rows dropped .* more than half"):
        build(Plain([*good, *[bad] * 5]), tmp_path, tokenizer)

    def endless():
        yield from good
        while True:
            yield bad

    with pytest.raises(TooManyDropped, match="rows dropped"):
        build(Plain(endless()), tmp_path, tokenizer)


def test_what_cannot_be_trained_on_is_named(tmp_path, tokenizer):
    with pytest.raises(RequestError, match="^train: found columns .*question.*, expected chosen and rejected"):
        build(Plain([{"question": "a"}]), tmp_path, tokenizer)
    with pytest.raises(RequestError, match="^train: holds no rows"):
        build(Plain([]), tmp_path, tokenizer)
    with pytest.raises(RequestError, match="split by node"):
        build(split_dataset_by_node(rows(9).to_iterable_dataset(), 0, 2), tmp_path, tokenizer)


def test_held_out_streams_are_read_once_to_their_end(tmp_path, tokenizer):
    held = with_bad(11, seed=9)
    table = build(rows(12), tmp_path / "a", tokenizer, datasets.Dataset.from_list(held))
    stream = Plain(held)
    both = {"x": stream, "y": rows(3).to_iterable_dataset()}
    streamed = build(Plain(rows(12)), tmp_path / "b", tokenizer, both)
    assert len(streamed.eval_dataset["x"]) == 9 == len(table.eval_dataset) and len(streamed.eval_dataset["y"]) == 3
    assert streamed.drop_reports["x"].dropped == table.drop_reports["eval"].dropped
    one, two = table.evaluate(), streamed.evaluate(streamed.eval_dataset["x"])
    assert one["eval_loss"] == pytest.approx(two["eval_loss"]) and stream.passes == 1
    streamed.evaluate(Plain(held))
