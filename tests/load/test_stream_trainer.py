"""Training on a stream: the losses, adapters and drops of the same rows as a table in their order; every row once."""

import datasets
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from peft import LoraConfig, get_peft_model
from torch.utils.data import IterableDataset
from transformers import LlamaConfig

from orpo_lite import ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.data import TooManyDropped, streaming
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows


class Plain(IterableDataset):
    """A torch stream of rows."""

    def __init__(self, given):
        self.given = given

    def __iter__(self):
        return iter(self.given)


def with_bad(count, seed=0, every=5):
    """Rows of which every fifth has no chosen answer left."""
    given = rows(count, seed).to_list()
    for number, row in enumerate(given):
        if number % every == 3:
            row["chosen"] = None
    return given


def train(data, folder, tokenizer, *, evaluation=None, resume=None, **options):
    model = tiny_model(LlamaConfig(**SIZES))
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    args = config(folder, **{"per_device_train_batch_size": 4, "max_steps": 8, "logging_steps": 1, "use_cpu": True, "seed": 3, "gradient_checkpointing": False} | options)  # fmt: skip
    trainer = ORPOTrainer(model, args, None, data, evaluation, tokenizer)
    trainer.train(resume_from_checkpoint=resume)
    logs = [log for log in trainer.state.log_history if "grad_norm" in log]
    weights = {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad}
    return trainer, logs, weights


def same(one, two):
    return one.keys() == two.keys() and all(torch.equal(one[name], two[name]) for name in one)


@pytest.mark.parametrize("options", [{}, {"gradient_accumulation_steps": 2, "per_device_train_batch_size": 2}, {"tokens_per_batch": 120}, {"tokens_per_batch": 150, "layout": "padded"}])  # fmt: skip
@pytest.mark.parametrize("kind", ["datasets", "torch"])
def test_a_stream_trains_as_its_rows_in_order(kind, options, tmp_path, tokenizer):
    given = with_bad(26)  # 21 good ones: a pass ends with a step of one pair, and the next begins
    table = datasets.Dataset.from_list(given)
    stream = table.to_iterable_dataset() if kind == "datasets" else Plain(given)
    plain, expected, weights = train(table, tmp_path / "a", tokenizer, train_sampling_strategy="sequential", **options)
    streamed, found, same_weights = train(stream, tmp_path / "b", tokenizer, **options)
    for a, b in zip(expected, found, strict=True):
        for name in ("loss", "grad_norm", "rewards/margins", "nll_loss"):
            assert b[name] == pytest.approx(a[name], rel=1e-5, abs=1e-6), (name, a["step"])
    assert all(torch.allclose(weights[name], same_weights[name], atol=1e-6) for name in weights)
    report = streamed.drop_reports["train"]
    assert report.dropped.keys() == plain.drop_reports["train"].dropped.keys()
    # 8 steps over 21 good rows of 26 are one pass and a part of the next
    assert (
        [drop.row for drop in report.drops][:5]
        == [drop.row for drop in plain.drop_reports["train"].drops]
        == [3, 8, 13, 18, 23]
    )


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("tokens", [None, 120])
def test_resumed_is_unbroken_bit_for_bit(workers, tokens, tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr(streaming, "CHUNK", 20)
    given = with_bad(2 * 20 + 7)
    options = {"dataloader_num_workers": workers, "tokens_per_batch": tokens, "save_steps": 5, "save_strategy": "steps", "per_device_train_batch_size": 3, "max_steps": 15}  # fmt: skip
    whole, logs, weights = train(Plain(given), tmp_path / "a", tokenizer, **options)
    assert whole.stream_watch.place.passes == 1  # the last checkpoint lies in the second pass
    for step in (5, 10):
        again, later, resumed = train(Plain(given), tmp_path / "b", tokenizer, resume=str(tmp_path / "a" / "out" / f"checkpoint-{step}"), **options)  # fmt: skip
        assert same(weights, resumed) and whole.stream_watch.place == again.stream_watch.place
        assert [log["loss"] for log in later][-5:] == [log["loss"] for log in logs][-5:]
        one, two = whole.drop_reports["train"], again.drop_reports["train"]
        assert (one.kept, one.counts, list(one.drops), str(one)) == (two.kept, two.counts, list(two.drops), str(two))


def test_resuming_tokenises_nothing_that_is_behind(tmp_path, tokenizer, monkeypatch):
    from orpo_lite.data.tokenize import PairTokenizer

    monkeypatch.setattr(streaming, "CHUNK", 10)
    given = rows(10 * 10).to_list()
    options = {"per_device_train_batch_size": 5, "save_steps": 16, "save_strategy": "steps", "max_steps": 17}
    train(Plain(given), tmp_path, tokenizer, **options)
    seen, call = [], PairTokenizer.__call__
    monkeypatch.setattr(
        PairTokenizer, "__call__", lambda self, rows: seen.extend(n for n, _ in rows) or call(self, rows)
    )
    train(Plain(given), tmp_path / "b", tokenizer, resume=str(tmp_path / "out" / "checkpoint-16"), **options)
    assert seen and min(seen) == 80


def test_max_steps_is_required(tmp_path, tokenizer):
    with pytest.raises(RequestError, match="max_steps: found -1, expected a number above 0"):
        train(Plain(rows(9)), tmp_path, tokenizer, max_steps=-1)


def test_drops_are_told_as_they_happen_and_in_the_end(tmp_path, tokenizer, caplog):
    caplog.set_level("INFO", "orpo_lite")
    train(Plain(with_bad(30)), tmp_path, tokenizer, max_steps=4)
    messages = [record.getMessage() for record in caplog.records]
    assert any("row 3 dropped, empty or missing side" in message for message in messages)
    assert any("3 of 15 rows read so far were dropped (3 empty or missing side)" in message for message in messages)
    assert any("16 of 20 rows kept" in message for message in messages)


def test_more_than_half_dropped_is_an_error(tmp_path, tokenizer):
    with pytest.raises(TooManyDropped, match="train: 20 of 30 rows dropped .* more than half"):
        train(Plain([row | {"chosen": None} if n % 3 else row for n, row in enumerate(rows(30))]), tmp_path, tokenizer)
    with pytest.raises(TooManyDropped, match="all of them"):
        train(Plain([row | {"chosen": None} for row in rows(1)] * 9 + [{"prompt": "x", "chosen": [], "rejected": []}]), tmp_path, tokenizer)  # fmt: skip

    good, bad = rows(4).to_list(), rows(1)[0] | {"chosen": None}

    def endless():
        yield from good
        while True:
            yield bad

    with pytest.raises(TooManyDropped, match="rows dropped"):  # not decided by an end
        train(Plain(endless()), tmp_path, tokenizer)


@pytest.mark.parametrize("workers", [0, 2])
def test_what_cannot_be_trained_on_is_named(workers, tmp_path, tokenizer):
    options = {"dataloader_num_workers": workers}
    with pytest.raises(RequestError, match="^train: found columns .*question.*, expected chosen and rejected"):
        train(Plain([{"question": "a"}]), tmp_path, tokenizer, **options)
    with pytest.raises(RequestError, match="^train: holds no rows"):
        train(Plain([]), tmp_path, tokenizer, **options)
    with pytest.raises(RequestError, match="^train: the stream holds no rows on pass 2: it can be read once only"):
        train(Plain(iter(rows(9))), tmp_path, tokenizer, **options)
    split = split_dataset_by_node(rows(9).to_iterable_dataset(), 0, 2)
    with pytest.raises(RequestError, match="split by node"):
        train(split, tmp_path, tokenizer, **options)


def test_pairs_tokenised_before_stream_as_well(tmp_path, tokenizer):
    table = rows(20)
    first, logs, _ = train(table, tmp_path / "a", tokenizer, train_sampling_strategy="sequential")
    tokens = first.train_dataset.to_list()
    _, again, _ = train(Plain(tokens), tmp_path / "b", tokenizer)
    assert [log["loss"] for log in again] == pytest.approx([log["loss"] for log in logs], rel=1e-5)


def test_held_out_streams_are_read_once_to_disk(tmp_path, tokenizer):
    reads = []

    class Counted(Plain):
        def __iter__(self):
            reads.append(1)
            return super().__iter__()

    held = with_bad(11, seed=9)
    table, _, _ = train(rows(12), tmp_path / "a", tokenizer, evaluation=datasets.Dataset.from_list(held), max_steps=1)
    stream, _, _ = train(Plain(rows(12)), tmp_path / "b", tokenizer, evaluation={"x": Counted(held), "y": rows(3).to_iterable_dataset()}, max_steps=1)  # fmt: skip
    assert len(stream.eval_dataset["x"]) == 9 == len(table.eval_dataset) and len(stream.eval_dataset["y"]) == 3
    assert stream.drop_reports["x"].dropped == table.drop_reports["eval"].dropped
    stream.model, stream.model_wrapped = table.model, table.model_wrapped
    one, two = table.evaluate(), stream.evaluate(stream.eval_dataset["x"])
    assert one["eval_loss"] == pytest.approx(two["eval_loss"]) and sum(reads) == 1
    stream.evaluate(Counted(held))
