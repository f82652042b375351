"""A run that is stopped and resumed ends as one that never stopped: weights bit for bit, and the same logs."""

import json
import os
import shutil
import signal
import subprocess

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, EarlyStoppingCallback, LlamaConfig, TrainerCallback

from orpo_lite import ORPOTrainer
from orpo_lite.common.errors import RequestError
from orpo_lite.trainer.callbacks import MetricsFile
from orpo_lite.trainer.checkpoint_folder import checkpoints, damage, manifest
from orpo_lite.trainer.interruptions import Stopped
from tests.training import SIZES, config, rows

LORA = dict(r=4, lora_alpha=8, target_modules="all-linear", lora_dropout=0.2)
TIMES = {"tokens_per_second", "pairs_per_second", "peak_memory_gb", "eval_runtime", "eval_samples_per_second",
         "eval_steps_per_second"}  # fmt: skip


@pytest.fixture(autouse=True)
def _heard():
    """SIGINT as a terminal's job has it: in a background job it is ignored, and stays so."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def llama(tmp_path, kind):
    torch.manual_seed(0)
    wider = {"hidden_size": 64, "intermediate_size": 128} if kind == "nf4" else {}  # blocks of 64 weights
    model = AutoModelForCausalLM.from_config(LlamaConfig(**SIZES | wider))
    if kind == "full":
        return model
    if kind == "nf4":
        model.save_pretrained(tmp_path / "base")
        four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=four)
    more = {
        "dora": {"use_dora": True},
        "embeddings": {"modules_to_save": ["embed_tokens", "lm_head"]},
        "bias": {"bias": "lora_only"},
        "tokens": {"trainable_token_indices": [3, 5]},
    }
    torch.manual_seed(1)
    return get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", **LORA, **more.get(kind, {})))


class Die(TrainerCallback):
    """The process is gone before step `step`: nothing after it happens."""

    def __init__(self, step):
        self.step = step

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == self.step - 1:
            raise ConnectionAbortedError


class Signal(TrainerCallback):
    def __init__(self, step, number, event="on_step_begin", times=1):
        def send(args, state, control, **kwargs):
            if state.global_step == step - 1:
                for _ in range(times):
                    os.kill(os.getpid(), number)

        setattr(self, event, send)


def trainer(tmp_path, tokenizer, kind="lora", callbacks=(), resumed=False, **words):
    words = {"max_steps": 9, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "disable_dropout": False,
             "train_sampling_strategy": "random", "save_total_limit": 3} | words  # fmt: skip
    made = ORPOTrainer(
        llama(tmp_path, kind), config(tmp_path, **words), None, rows(22), rows(6, 1), tokenizer,
        callbacks=[MetricsFile(tmp_path / "metrics.jsonl", resumed), *callbacks],
    )  # fmt: skip
    return made


@pytest.fixture(scope="module")
def whole(tmp_path_factory, tokenizer):
    """Run that never stopped: (trainer, folder), made once for each kind and options."""
    made = {}

    def run(kind="lora", **words):
        key = (kind, *sorted(words.items()))
        if key not in made:
            folder = tmp_path_factory.mktemp("whole")
            made[key] = trainer(folder, tokenizer, kind, **words), folder
            made[key][0].train()
        return made[key]

    return run


def weights(made):
    return {name: p.detach().clone() for name, p in made.model.named_parameters() if p.requires_grad}


def lines(tmp_path):
    found = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key not in TIMES} for line in found]


def same_lines(one, other):
    """Every number but times, to the last bit."""
    one, other = lines(one), lines(other)
    assert [line["step"] for line in one] == [line["step"] for line in other]
    for a, b in zip(one, other, strict=True):
        assert a.keys() == b.keys()
        assert {key: (a[key], b[key]) for key in a if a[key] != b[key]} == {}


def equal(whole, resumed):
    assert whole.keys() == resumed.keys() and whole
    for name in whole:
        assert torch.equal(whole[name], resumed[name]), name


EVALUATING = dict(eval_strategy="steps", eval_steps=2)
CASES = {
    "lora": {},
    "accumulation": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "budget": dict(tokens_per_batch=120),
    "epochs": dict(save_strategy="epoch", eval_strategy="epoch", logging_strategy="epoch", num_train_epochs=2, max_steps=-1),
    "evaluating": EVALUATING,
    "workers": dict(dataloader_num_workers=1),
    "best": EVALUATING | dict(load_best_model_at_end=True, save_total_limit=1),
    "plateau": EVALUATING | dict(lr_scheduler_type="reduce_lr_on_plateau", metric_for_best_model="loss"),
}  # fmt: skip


@pytest.mark.parametrize("case", CASES)
def test_killed_at_any_moment_of_the_loop_and_resumed(tmp_path, tokenizer, whole, case):
    words = CASES[case]
    never_stopped, folder = whole(**words)
    killed = trainer(tmp_path / "cut", tokenizer, callbacks=[Die(8)], **words)
    with pytest.raises(ConnectionAbortedError):
        killed.train()
    again = trainer(tmp_path / "cut", tokenizer, resumed=True, **words)
    again.train(resume_from_checkpoint=True)
    assert again.state.global_step == never_stopped.state.global_step
    equal(weights(never_stopped), weights(again))
    same_lines(folder, tmp_path / "cut")
    steps = [line["step"] for line in lines(tmp_path / "cut") if "loss" in line]
    assert steps == sorted(set(steps)) and steps


@pytest.mark.parametrize("kind", ["full", "nf4", "dora", "embeddings", "bias", "tokens"])
def test_every_kind_of_trained_weight_is_resumed(tmp_path, tokenizer, whole, kind):
    never_stopped, folder = whole(kind)
    with pytest.raises(ConnectionAbortedError):
        trainer(tmp_path / "cut", tokenizer, kind, callbacks=[Die(6)]).train()
    again = trainer(tmp_path / "cut", tokenizer, kind, resumed=True)
    again.train(resume_from_checkpoint=True)
    equal(weights(never_stopped), weights(again))


def test_a_checkpoint_of_the_last_step_is_not_trained_on(tmp_path, tokenizer):
    """transformers takes one step more, where max_steps ends inside an epoch."""
    whole = trainer(tmp_path, tokenizer, max_steps=4)
    whole.train()
    again = trainer(tmp_path, tokenizer, max_steps=4)
    again.train(resume_from_checkpoint=str(tmp_path / "out/checkpoint-4"))
    assert again.state.global_step == 4
    equal(weights(whole), weights(again))


def test_early_stopping_counts_on(tmp_path, tokenizer, whole):
    """With nothing learned, the third evaluation in a row stops the run, whether or not it was killed before."""
    words = EVALUATING | dict(learning_rate=1e-30, early_stopping_patience=2, max_steps=30)
    never_stopped, folder = whole(**words)
    assert never_stopped.state.global_step == 6
    with pytest.raises(ConnectionAbortedError):
        trainer(tmp_path / "cut", tokenizer, callbacks=[Die(6)], **words).train()
    for _ in range(2):  # the second time from the checkpoint of the last step
        again = trainer(tmp_path / "cut", tokenizer, resumed=True, **words)
        again.train(resume_from_checkpoint=True)
        assert again.state.global_step == 6
        same_lines(folder, tmp_path / "cut")
        stop = next(c for c in again.callback_handler.callbacks if isinstance(c, EarlyStoppingCallback))
        assert stop.early_stopping_patience_counter == 2


@pytest.mark.parametrize(
    ("number", "step"), [(signal.SIGTERM, 3), (signal.SIGINT, 3), (signal.SIGTERM, 6), (signal.SIGINT, 9)]
)
def test_a_signal_saves_and_stops_and_the_run_resumes(tmp_path, tokenizer, whole, number, step):
    """In mid epoch, at an epoch's last step (its evaluation included), and at the run's last step."""
    words = dict(eval_strategy="epoch", save_strategy="no")
    never_stopped, folder = whole(**words)
    before = signal.getsignal(number)
    cut = trainer(tmp_path / "cut", tokenizer, callbacks=[Signal(step, number)], **words)
    with pytest.raises(Stopped, match=f"stopped at step {step}") as stop:
        cut.train()
    assert stop.value.number == number and signal.getsignal(number) is before
    assert [path.name for path in checkpoints(tmp_path / "cut/out")] == [f"checkpoint-{step}"]
    again = trainer(tmp_path / "cut", tokenizer, resumed=True, **words)
    again.train(resume_from_checkpoint=True)
    equal(weights(never_stopped), weights(again))
    same_lines(folder, tmp_path / "cut")


def test_a_signal_while_evaluating_saves_after_it(tmp_path, tokenizer, whole):
    words = EVALUATING | dict(save_strategy="no")
    never_stopped, folder = whole(**words)
    cut = trainer(tmp_path / "cut", tokenizer, callbacks=[Signal(5, signal.SIGINT, "on_prediction_step")], **words)
    with pytest.raises(Stopped, match="step 4"):
        cut.train()
    again = trainer(tmp_path / "cut", tokenizer, resumed=True, **words)
    again.train(resume_from_checkpoint=True)
    equal(weights(never_stopped), weights(again))
    same_lines(folder, tmp_path / "cut")


def test_an_ignored_signal_stays_ignored(tmp_path, tokenizer):
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    made = trainer(tmp_path, tokenizer, callbacks=[Signal(3, signal.SIGINT)], save_strategy="no")
    made.train()
    assert made.state.global_step == 9 and signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_a_second_signal_stops_at_once(tmp_path, tokenizer):
    cut = trainer(tmp_path, tokenizer, callbacks=[Signal(3, signal.SIGINT, times=2)], save_strategy="no")
    with pytest.raises(Stopped, match="at once"):
        cut.train()
    assert not checkpoints(tmp_path / "out") and cut.state.global_step == 2


def test_checkpoints_by_the_clock(tmp_path, tokenizer):
    made = trainer(tmp_path, tokenizer, save_strategy="no", save_minutes=1e-9, save_total_limit=None)
    made.train()
    assert [path.name for path in checkpoints(tmp_path / "out")] == [f"checkpoint-{i}" for i in range(1, 10)]
    seldom = trainer(tmp_path / "seldom", tokenizer, save_strategy="no", save_minutes=60)
    seldom.train()
    assert not checkpoints(tmp_path / "seldom/out")


def test_a_damaged_checkpoint_is_passed_over_and_named(tmp_path, tokenizer, caplog):
    whole = trainer(tmp_path, tokenizer)
    whole.train()
    last = checkpoints(tmp_path / "out")[-1]
    os.truncate(last / "optimizer.pt", 1000)
    again = trainer(tmp_path, tokenizer, resumed=True)
    again.train(resume_from_checkpoint=True)
    assert "checkpoint-9: optimizer.pt has 1,000 bytes" in caplog.text
    equal(weights(whole), weights(again))
    assert damage(last) is None, "written anew"
    (last / "scheduler.pt").unlink()
    with pytest.raises(RequestError, match=r"scheduler\.pt is missing"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=str(last))
    for path in checkpoints(tmp_path / "out"):
        (path / "adapter_model.safetensors").write_bytes(b"")
    with pytest.raises(RequestError, match="holds no good checkpoint"):
        trainer(tmp_path, tokenizer).train(resume_from_checkpoint=True)


def test_a_limit_keeps_what_is_written_after_a_damaged_checkpoint(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, max_steps=8).train()
    old = checkpoints(tmp_path / "out")
    assert [path.name for path in old] == ["checkpoint-4", "checkpoint-6", "checkpoint-8"], "no more than the limit"
    (old[-1] / "optimizer.pt").unlink()
    for path in old:
        os.utime(path, (path.stat().st_mtime - 60,) * 2)
    with pytest.raises(ConnectionAbortedError):
        again = trainer(tmp_path, tokenizer, resumed=True, save_minutes=1e-9, save_total_limit=1, callbacks=[Die(8)])
        again.train(resume_from_checkpoint=True)
    assert [path.name for path in checkpoints(tmp_path / "out")] == ["checkpoint-7"]


def test_steps_of_other_pairs_and_checkpoints_without_a_manifest_are_refused(tmp_path, tokenizer):
    trainer(tmp_path, tokenizer, max_steps=2).train()
    with pytest.raises(RequestError, match="4 pairs an optimizer step, here it is 2"):
        trainer(tmp_path, tokenizer, per_device_train_batch_size=2).train(resume_from_checkpoint=True)
    one = tmp_path / "out/checkpoint-2"
    assert manifest(one)["processes"] == 1 and not (one / "training_args.bin").exists()
    (one / "manifest.json").unlink()
    with pytest.raises(RequestError, match=r"checkpoint-2: manifest\.json is missing, so the checkpoint is incomplete"):
        trainer(tmp_path, tokenizer, max_steps=2).train(resume_from_checkpoint=str(one))


def test_a_run_folder_that_was_moved_keeps_its_best(tmp_path, tokenizer):
    words = EVALUATING | dict(load_best_model_at_end=True, learning_rate=0.5, save_total_limit=1)
    with pytest.raises(ConnectionAbortedError):
        trainer(tmp_path / "here", tokenizer, callbacks=[Die(8)], **words).train()
    shutil.move(tmp_path / "here", tmp_path / "there")
    again = trainer(tmp_path / "there", tokenizer, resumed=True, **words)
    again.train(resume_from_checkpoint=True)
    best = again.state.best_model_checkpoint
    assert best is not None and best.startswith(str(tmp_path / "there"))


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", place], capture_output=True).returncode:
        pytest.skip("mounting a tmpfs needs root")
    yield place
    subprocess.run(["umount", "-l", place], capture_output=True)


def test_a_full_disk_while_saving_is_survived(tmp_path, tokenizer, whole, small_disk, caplog):
    """Room for one checkpoint: later ones fail, training continues, the first stays and is resumed from."""
    never_stopped, folder = whole()
    size = sum(f.stat().st_size for f in checkpoints(folder / "out")[0].rglob("*"))
    fill = small_disk / "fill"

    class Fill(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                fill.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096 - size // 2))

    full = trainer(small_disk, tokenizer, callbacks=[Fill()])
    full.train()
    equal(weights(never_stopped), weights(full))
    assert (
        "checkpoint-4 could not be written (" in caplog.text and "training continues; checkpoint-2 stays" in caplog.text
    )
    assert [p.name for p in (small_disk / "out").iterdir() if "checkpoint" in p.name] == ["checkpoint-2"]
    fill.unlink()
    again = trainer(small_disk, tokenizer, resumed=True)
    again.train(resume_from_checkpoint=True)
    equal(weights(never_stopped), weights(again))
    same_lines(folder, small_disk)


def test_metrics_wait_for_a_disk_that_is_full_or_gone(tmp_path, tokenizer, small_disk, caplog):
    fill = small_disk / "fill"

    class Fill(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            if state.global_step == 2:
                fill.write_bytes(bytes(os.statvfs(small_disk).f_bavail * 4096))
            if state.global_step == 7:
                fill.unlink()

    made = trainer(small_disk, tokenizer, callbacks=[Fill()], save_strategy="no", logging_steps=1)
    made.args.output_dir = str(tmp_path)
    made.train()
    assert [line["step"] for line in lines(small_disk)] == list(range(1, 10))
    assert caplog.text.count("its lines are kept until it can") == 1


def test_a_drive_that_is_gone_is_said_and_nothing_is_written_under_its_name(
    tmp_path, tokenizer, whole, small_disk, caplog
):
    """As Colab's Drive goes: the mount point is an empty folder of the machine's own disk then."""
    never_stopped, folder = whole()

    class Gone(TrainerCallback):
        def on_save(self, args, state, control, **kwargs):
            if state.global_step == 2:
                subprocess.run(["umount", "-l", small_disk], check=True)

    (small_disk / "run").mkdir()
    made = trainer(small_disk / "run", tokenizer, callbacks=[Gone()])
    made.train()
    equal(weights(never_stopped), weights(made))
    assert "checkpoint-4 could not be written (No such file or directory): training continues" in caplog.text
    assert not os.listdir(small_disk)
