"""Training on a stream by real processes over gloo: each row tokenised once, the same training as by one, and resumed."""

import multiprocessing
import os
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig

from orpo_lite import ORPOTrainer
from orpo_lite.data import streaming
from orpo_lite.data.tokenize import PairTokenizer
from tests.load.test_stream_trainer import Plain, same, with_bad
from tests.scale.checks import tokenizer
from tests.scale.group import together
from tests.tiny import tiny_model
from tests.training import SIZES, config, rows


class Watched(ORPOTrainer):
    """Keeps the rows of each step's pairs that this process computed."""

    def training_step(self, model, inputs, num_items_in_batch=None):
        self.steps.append([row for batch in inputs["micro_batches"] for row in batch["pair_rows"].tolist()])
        return super().training_step(model, inputs, num_items_in_batch)


class DiesOnOne(Plain):
    """A stream whose source breaks on the second process only."""

    def __iter__(self):
        yield from self.given[:60]
        if os.environ.get("RANK") == "1":
            raise ConnectionError("the line is dead")
        yield from self.given[60:]


def trained(out, given, options, resume=None):
    """What this process did, and what came of it."""
    streaming.CHUNK = 10
    multiprocessing.current_process()._config["daemon"] = False  # the loader's workers are its children
    out = Path(out)
    processes, rank = int(os.environ.get("WORLD_SIZE", 1)), os.environ.get("RANK", "0")
    call = PairTokenizer.__call__

    def told(self, rows):
        with (out / f"rows-{rank}-{os.getpid()}").open("a") as file:
            file.write("".join(f"{number}\n" for number, _ in rows))
        return call(self, rows)

    PairTokenizer.__call__ = told
    model = tiny_model(LlamaConfig(**SIZES))
    torch.manual_seed(1)
    model = get_peft_model(model, LoraConfig(r=4, target_modules="all-linear"))
    args = config(out, per_device_train_batch_size=8 // processes, max_steps=7, use_cpu=True, **options)
    trainer = Watched(model, args, None, given, None, tokenizer())
    trainer.steps = []
    try:
        trainer.train(resume_from_checkpoint=resume)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    files = sorted(out.glob(f"rows-{rank}-*"))
    return {
        "steps": trainer.steps,
        "losses": [log["loss"] for log in trainer.state.log_history if "grad_norm" in log],
        "weights": {name: p.detach().clone() for name, p in trainer.model.named_parameters() if p.requires_grad},
        "report": str(trainer.drop_reports["train"]),
        "tokenised": [sorted({int(line) for line in file.read_text().split()}) for file in files],
    }


def close(one, two):
    return all(torch.allclose(one["weights"][name], two["weights"][name], atol=1e-6) for name in one["weights"])


@pytest.mark.parametrize("workers, budget", [(0, None), (3, 120)])
def test_two_processes_tokenise_half_each_and_train_as_one(workers, budget, tmp_path):
    given, options = Plain(with_bad(26)), {"dataloader_num_workers": workers, "tokens_per_batch": budget}
    [one] = together(trained, 1, tmp_path / "1", str(tmp_path / "1"), given, options)
    two = together(trained, 2, tmp_path / "2", str(tmp_path / "2"), given, options)
    for step, whole in enumerate(one["steps"]):
        assert sorted(two[0]["steps"][step] + two[1]["steps"][step]) == sorted(whole)
    good = [n for n in range(26) if n % 5 != 3]
    assert [row for step in one["steps"][:3] for row in sorted(step)] == good  # one pass: 8, 8 and 5 of 21
    each = max(1, workers)
    for rank, found in enumerate(two):
        assert found["report"] == one["report"] and close(one, found)
        assert found["losses"] == pytest.approx(one["losses"], rel=1e-4)
        assert len(found["tokenised"]) == each
        mine = [n for n in range(26) if n % (2 * each) // each == rank]
        assert sorted(sum(found["tokenised"], [])) == mine  # by no two workers either
    assert same(two[0]["weights"], two[1]["weights"])


@pytest.mark.slow
def test_resumed_by_as_many_bit_for_bit_and_by_one_with_the_same_pairs(tmp_path):
    given = Plain(with_bad(26))
    options = {"save_strategy": "steps", "save_steps": 2, "dataloader_num_workers": 1}
    whole = together(trained, 2, tmp_path / "2", str(tmp_path / "2"), given, options)
    for step in (2, 4):  # the later one lies in the second pass
        checkpoint = str(tmp_path / "2" / "out" / f"checkpoint-{step}")
        out = tmp_path / f"from-{step}"
        for one, again in zip(whole, together(trained, 2, out, str(out), given, options, checkpoint), strict=True):
            assert same(one["weights"], again["weights"]) and again["report"] == one["report"]
            assert (again["steps"], again["losses"]) == (one["steps"][step:], one["losses"])
        out = tmp_path / f"alone-from-{step}"
        [alone] = together(trained, 1, out, str(out), given, options, checkpoint)
        assert close(whole[0], alone) and alone["report"] == whole[0]["report"]
        for place, pairs in enumerate(alone["steps"], step):
            assert sorted(pairs) == sorted(whole[0]["steps"][place] + whole[1]["steps"][place])


@pytest.mark.parametrize("workers", [0, pytest.param(2, marks=pytest.mark.slow)])
def test_what_breaks_on_one_process_ends_both_with_its_message(workers, tmp_path):
    given, options = DiesOnOne(rows(100).to_list()), {"dataloader_num_workers": workers}
    other, broken = together(trained, 2, tmp_path, str(tmp_path), given, options, timeout=120)
    assert broken.startswith("ConnectionError: ") and "the line is dead" in broken
    assert other == "RequestError: train: process 1 cannot read on (ConnectionError: the line is dead)"
