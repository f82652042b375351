"""`orpo_lite.train` as a user has it: the run folder, what is printed, resuming, and the exit status."""

import json
import shutil
import subprocess
import sys

import pytest
import torch
import yaml
from peft import AutoPeftModelForCausalLM, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoTokenizer, T5Config, T5ForConditionalGeneration

from orpo_lite.__main__ import load
from orpo_lite.common.console import run_command
from orpo_lite.common.errors import RequestError
from orpo_lite.common.files import lock_folder, unlock_folder
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run
from tests.commands import command
from tests.tiny import tiny_tokenizer

SHORT = ["training.max_steps=4", "training.eval_steps=2", "training.logging_steps=1", "evaluation.samples=2",
         "evaluation.max_new_tokens=8"]  # fmt: skip


def recipe(output, *words):
    return Recipe.load("quickstart", [*SHORT, "data.max_eval_rows=16", f"training.output_dir={output}", *words])


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short quickstart run and what it printed."""
    output = tmp_path_factory.mktemp("runs") / "quick"
    done = orpo_lite("train", "--recipe", "quickstart", *SHORT, f"training.output_dir={output}")
    assert done.returncode == 0, done.stderr
    return output, done


def orpo_lite(name, *words):
    return command(name, *words, COLUMNS="120")


def test_run_folder_holds_what_later_commands_take(finished):
    folder, _ = finished
    names = {path.name for path in folder.iterdir()}
    assert {"adapter_model.safetensors", "adapter_config.json", "tokenizer.json", "chat_template.jinja", "recipe.yaml",
            "run.json", "metrics.jsonl", "report.html", "README.md", "checkpoints"} <= names  # fmt: skip
    facts = json.loads((folder / "run.json").read_text())
    for key in ("versions", "device", "seed", "base_model", "data", "layout", "train_seconds", "pairs_per_second",
                "peak_memory_bytes", "eval", "samples"):  # fmt: skip
        assert facts[key], key
    assert facts["data"]["fingerprint"] and facts["data"]["drops"]["kept"] == 600
    assert facts["eval"]["before"]["pairs"] == facts["eval"]["after"]["pairs"] == 120
    assert len(facts["samples"]["before"]) == len(facts["samples"]["after"]) == 2
    assert "logp_trained" in facts["samples"]["before"][0] and "ids" not in facts["samples"]["after"][0]
    held = json.loads((folder / "held_out.json").read_text())
    for when in ("before", "after"):
        each = zip(held[when]["logps/chosen"], held[when]["logps/rejected"], strict=True)
        margins = [held["beta"] * (chosen - rejected) for chosen, rejected in each]
        assert len(margins) == 120
        assert sum(margins) / 120 == pytest.approx(facts["eval"][when]["rewards/margins"], abs=1e-6)
        assert sum(m > 0 for m in margins) / 120 == pytest.approx(facts["eval"][when]["rewards/accuracies"], abs=1e-6)
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if "loss" in line] == [1, 2, 3, 4]
    assert {"eval_rewards/accuracies", "eval_loss", "eval_nll_loss"} <= set(next(x for x in lines if "eval_loss" in x))
    page, card = (folder / "report.html").read_text(), (folder / "README.md").read_text()
    assert "<svg" in page and "http" not in page.replace("http://www.w3.org/2000/svg", "")
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft" and "120 held-out pairs" in card


def test_resolved_recipe_repeats_the_run(finished, tmp_path):
    folder, _ = finished
    again = Recipe.load(str(folder), [f"training.output_dir={tmp_path / 'again'}"])
    result = run(again)
    assert result.record.data.fingerprint == json.loads((folder / "run.json").read_text())["data"]["fingerprint"]
    first, second = (load_file(path / "adapter_model.safetensors") for path in (folder, tmp_path / "again"))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_peft_and_transformers_load_the_folder(finished):
    folder, _ = finished
    model = AutoPeftModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, PeftModel)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert "<|im_start|>" in tokenizer.apply_chat_template([{"role": "user", "content": "Hi"}], tokenize=False)


def test_prints_results_and_what_to_do_next_on_one_screen(finished):
    folder, done = finished
    out = " ".join(done.stdout.split())
    for words in ("480 training pairs, 120 held out", "4 of 8 pairs (0.07 epochs), learning rate 0.004", "153,600 parameters",
                  "120 held-out pairs before after", "last, step 4", "answers in the chosen style"):  # fmt: skip
        assert words in out, words
    lines = done.stdout.splitlines()
    assert len(lines) <= 26, done.stdout
    merged = folder.with_name(f"{folder.name}-merged")
    assert lines[-3:] == [
        "next:",
        f"  python -m orpo_lite.chat {folder}",
        f"  python -m orpo_lite.merge {folder} --output {merged}",
    ]
    for noise in ("Warning", "deprecated", "Traceback"):
        assert noise not in done.stderr


def test_evaluate_gives_what_the_run_measured(finished):
    folder, _ = finished
    done = orpo_lite("evaluate", folder, "--json")
    assert done.returncode == 0, done.stderr
    got, facts = json.loads(done.stdout), json.loads((folder / "run.json").read_text())
    for side, when in (("base", "before"), ("adapter", "after")):
        for key in ("rewards/accuracies", "rewards/margins", "nll_loss", "log_odds_chosen", "length_baseline"):
            assert got[side][key] == pytest.approx(facts["eval"][when][key], abs=1e-5), key
    low, high = got["adapter"]["rewards/accuracies_interval"]
    assert 0 <= low < got["adapter"]["rewards/accuracies"] < high <= 1


def test_report_is_written_again(finished):
    folder, _ = finished
    (folder / "report.html").unlink()
    assert orpo_lite("report", folder).returncode == 0
    assert (folder / "report.html").is_file()


def test_dry_run_writes_nothing_and_verbose_says_everything(tmp_path, capsys):
    assert run(recipe(tmp_path / "dry"), dry_run=True, verbose=True) is None
    assert not list(tmp_path.iterdir())
    out = " ".join(capsys.readouterr().out.split())
    for words in ("first step's loss is", "496 of 496 rows kept", "8 pairs x 1 accumulation x 1 process", "153,600 of 1,497,792",
                  "float32 computing on the CPU", "sdpa", "layout shared", "checkpointing off", "linear schedule"):  # fmt: skip
        assert words in out, words


def test_killed_run_goes_on_from_its_checkpoint(tmp_path):
    """Stopped after the checkpoint of step 4, and ended as a run that was never stopped."""
    words = ("training.max_steps=6", "training.save_strategy=steps", "training.save_steps=2", "training.eval_steps=6",
             "evaluation.samples=0")  # fmt: skip
    run(recipe(tmp_path / "whole", *words))
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut" / "checkpoints" / "checkpoint-6")
    for name in ("run.json", "adapter_model.safetensors"):
        (tmp_path / "cut" / name).unlink()
    saved = yaml.safe_load((tmp_path / "cut" / "recipe.yaml").read_text())
    saved["training"]["output_dir"] = str(tmp_path / "cut")
    (tmp_path / "cut" / "recipe.yaml").write_text(yaml.safe_dump(saved))

    result = run(recipe(tmp_path / "cut", *words), resume=True)

    assert result.folder == tmp_path / "cut" and result.record.steps == 6
    first, second = (load_file(tmp_path / name / "adapter_model.safetensors") for name in ("whole", "cut"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    steps = [json.loads(line)["step"] for line in (tmp_path / "cut" / "metrics.jsonl").read_text().splitlines()
             if "grad_norm" in line]  # fmt: skip
    assert steps == [1, 2, 3, 4, 5, 6]
    evaluated = [(tmp_path / name / "metrics.jsonl").read_text().count('"eval_loss"') for name in ("whole", "cut")]
    assert evaluated[0] == evaluated[1]
    with pytest.raises(RequestError, match="finished"):
        run(recipe(tmp_path / "cut", *words), resume=True)


def test_resume_with_another_recipe_is_refused(tmp_path):
    words = ("training.save_strategy=steps", "training.save_steps=2", "evaluation.samples=0")
    run(recipe(tmp_path / "run", *words))
    (tmp_path / "run" / "run.json").unlink()
    with pytest.raises(RequestError, match=r"orpo.beta: was 0.1, is 0.2"):
        run(recipe(tmp_path / "run", *words, "orpo.beta=0.2"), resume=True)
    with pytest.raises(RequestError, match="holds no checkpoint"):
        run(recipe(tmp_path / "empty"), resume=True)


def test_a_finished_run_is_never_written_over(finished):
    folder, _ = finished
    before = (folder / "run.json").read_bytes()
    result = run(recipe(folder, "evaluation.samples=0"))
    assert (
        result.folder.parent == folder.parent
        and result.folder != folder
        and (folder / "run.json").read_bytes() == before
    )


def test_a_numbered_run_is_resumed_by_its_folder(finished):
    """The second run of a name goes to NAME-2, whose recipe leads back there."""
    folder, _ = finished
    words = ("training.save_strategy=steps", "training.save_steps=2", "evaluation.samples=0")
    second = run(recipe(folder, *words)).folder
    assert second != folder
    (second / "run.json").unlink()
    shutil.rmtree(second / "checkpoints" / "checkpoint-4")
    result = run(Recipe.load(str(second)), resume=True)
    assert result.folder == second and result.record.steps == 4


def test_best_adapter_is_said_to_be_left(tmp_path):
    words = ("training.save_strategy=steps", "training.save_steps=2", "training.load_best_model_at_end=true",
             "training.metric_for_best_model=eval_loss", "evaluation.samples=0")  # fmt: skip
    result = run(recipe(tmp_path / "best", *words))
    assert (result.record.adapter or "").startswith("best by eval_loss")


def test_encoder_decoders_are_refused_by_name_by_every_command(tmp_path, monkeypatch, capfd):
    base, adapter, rows = tmp_path / "t5", tmp_path / "adapter", tmp_path / "rows.jsonl"
    model = T5ForConditionalGeneration(T5Config(vocab_size=320, d_model=16, d_kv=4, d_ff=16, num_layers=1, num_heads=4))
    for folder in (base, adapter):
        tiny_tokenizer(eos="</s>", pad="<pad>").save_pretrained(folder)
    model.save_pretrained(base)
    get_peft_model(model, LoraConfig(r=1, target_modules=["q"])).save_pretrained(adapter)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    rows.write_text(json.dumps({"prompt": "a", "chosen": "b", "rejected": "c"}) + "\n")
    named = ["--recipe", "quickstart", f"model.name_or_path={base}"]
    commands = {
        "train": named, "data": named, "plan": named, "new": [rows, "--model", base],
        "evaluate": [adapter, "--data", rows], "merge": [adapter, "--output", tmp_path / "merged"],
        "export": [base, "--output", tmp_path / "a.gguf"],
    }  # fmt: skip
    for name, words in commands.items():
        monkeypatch.setattr(sys, "argv", [name, *map(str, words)])
        with pytest.raises(SystemExit) as stop:
            run_command(load(name))
        said = " ".join(capfd.readouterr().err.split())
        assert stop.value.code == 2 and f"{base} is an encoder-decoder (t5)" in said, (name, said)
        assert "use one of those, or TRL's ORPOTrainer" in said


VARIETIES = {
    "dora, tensorboard, head chunk": ["adapter.use_dora=true", "training.report_to=tensorboard", "memory.head_chunk=16"],
    "full fine-tuning, epochs": ["adapter=null", "model.quantization=none", "training.max_steps=-1",
                                 "training.num_train_epochs=0.1"],
    "fp4, lora+, token budget, one layer checkpoints, nll over chosen": [
        "model.quantization=fp4", "adapter.loraplus_lr_ratio=16", "orpo.tokens_per_batch=200", "training.gradient_accumulation_steps=2",
        "memory.checkpointing=1", "orpo.nll_scope=chosen"],
}  # fmt: skip


@pytest.mark.parametrize("name", VARIETIES)
def test_varieties_train(name, tmp_path):
    result = run(recipe(tmp_path / "run", "training.learning_rate=1e-4", "evaluation.samples=0", *VARIETIES[name]))
    before, after = (result.record.evaluation(when)["loss"] for when in ("before", "after"))
    assert after < before
    if "tensorboard" in name:
        assert list((tmp_path / "run" / "tensorboard").glob("events.out.tfevents*"))


def test_a_loss_that_is_not_finite_stops_the_run(tmp_path):
    done = orpo_lite("train", "--recipe", "quickstart", *SHORT, f"training.output_dir={tmp_path / 'nan'}",
                     "training.learning_rate=1e30", "training.max_grad_norm=0", "training.max_steps=8")  # fmt: skip
    assert done.returncode == 1 and "learning_rate" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "nan" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["train", "--recipe", "quickstart", "training.learning_rat=1"], "did you mean training.learning_rate=1?"),
        (["train", "--recipe", "quickstrat"], "quickstart"),
        (["train", "--recipe", "quickstart", "data.train=absent.jsonl"], "absent.jsonl"),
        (["train", "--recipe", "quickstart", "model.name_or_path=/absent/model"], "/absent/model"),
        (["evaluate", "/absent/run"], "/absent/run"),
        (["merge", "/absent/run", "--output", "/tmp/out"], "/absent/run"),
    ],
)
def test_wrong_requests_exit_2_and_say_what_to_do(words, said, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", words)
    with pytest.raises(SystemExit) as stopped:
        run_command(load(words[0]))
    out, err = capsys.readouterr()
    assert stopped.value.code == 2
    assert said in err and "Traceback" not in err and out == ""


HEAVY = {"torch", "transformers", "datasets", "peft", "bitsandbytes"}


@pytest.mark.parametrize(
    ("words", "status"),
    [
        (["train", "--help"], 0),
        (["train", "--recipe", "quickstrat"], 2),
        (["train", "--recipe", "quickstart", "training.learning_rat=1"], 2),
        (["train", "--recipe", "quickstart", "orpo.beta=-1"], 2),
        (["train", "--recipe", "quickstart", "data.train=absent.jsonl"], 2),
        (["train", "--recipe", "quickstart", "data.eval=absent/*.jsonl"], 2),
        (["train", "--recipe", "quickstart", "model.name_or_path=/absent/model"], 2),
        (["train", "--recipe", "quickstart", "--dry-run", "--resume"], 2),
        (["train", "--recipe", "quickstart", "training.output_dir={busy}"], 2),
        (["train", "--learning_rate=1"], 2),
    ],
)
def test_help_and_errors_load_no_torch(words, status, tmp_path):
    lock_folder(tmp_path)
    script = (
        "import sys; from orpo_lite.__main__ import main\n"
        "try: main()\n"
        f"finally: print(*({HEAVY} & sys.modules.keys()), file=open({str(tmp_path / 'loaded')!r}, 'w'))"
    )
    words = [word.format(busy=tmp_path) for word in words]
    done = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True)
    unlock_folder(tmp_path)
    assert done.returncode == status and "Traceback" not in done.stderr, done.stderr
    assert not (tmp_path / "loaded").read_text().strip()
    assert ("another process is training in this folder" in done.stderr) == (str(tmp_path) in str(words))


@pytest.mark.parametrize("arguments", [["-c", "import orpo_lite"], ["-m", "orpo_lite", "--help"]])
def test_import_and_help_load_next_to_nothing(arguments):
    done = subprocess.run([sys.executable, "-X", "importtime", *arguments], capture_output=True, text=True)
    assert done.returncode == 0
    modules = {line.split("|")[-1].strip() for line in done.stderr.splitlines()}
    assert not modules & {*HEAVY, "numpy", "pydantic"}


def test_usage_names_the_command_as_it_was_started():
    done = subprocess.run([sys.executable, "-m", "orpo_lite", "train", "--help"], capture_output=True, text=True)
    assert done.stdout.strip().startswith("Usage: orpo-lite train ")
