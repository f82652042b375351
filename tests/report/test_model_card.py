"""The model card: everything in it from run.json, front matter that the hub takes, text that stays in its fence."""

import contextlib
import http.server
import io
import json
import math
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, metadata_load
from markdown_it import MarkdownIt
from PIL import Image

from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import fence, inline
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import PACKAGE
from orpo_lite.report.charts import draw_card_curves
from orpo_lite.report.drawing import BLUE, COLORS, GREEN, ORANGE, RED
from orpo_lite.report.model_card import find_license, hub_id, model_card, published_recipe
from orpo_lite.train.pipeline import run
from orpo_lite.trainer.run_record import LoadedRun, RunRecord, read_run

SHORT = [
    "training.eval_steps=2",
    "training.logging_steps=1",
    "evaluation.samples=2",
    "evaluation.max_new_tokens=8",
]
HOSTILE = [
    "</td></tr></table></details>\n\n# Pwned\n\n```\nout?\n```\n~~~\n",
    "``````\n<script>alert(1)</script>\n``````text\n| a | b |\n|---|---|\n",
    "> quote\n---\nlicense: mit\n---\r# carriage\r\n\r\n1. list ![x](http://x/y.png) @user $$x$$",
    "\u202eright to left\u202c \u05e9\u05dc\u05d5\u05dd \x00\x1b[31m \ud800 end",
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A short quickstart run."""
    output = tmp_path_factory.mktemp("runs") / "quick"
    run(Recipe.load("quickstart", [*SHORT, "training.max_steps=4", f"training.output_dir={output}"]))
    return output


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """One step of full fine-tuning of a local base, nothing held out."""
    place = tmp_path_factory.mktemp("whole")
    base = shutil.copytree(PACKAGE / "data" / "quickstart" / "model", place / "secret-place" / "my-base")
    (base / "README.md").write_text("---\nlicense: cc-by-4.0\n---\n# my base\n")
    shutil.copy(PACKAGE / "data" / "quickstart" / "train.jsonl", place / "secret-place" / "mine.jsonl")
    words = [f"model.name_or_path={base}", "model.quantization=none", "adapter=null", "data.eval=null",
             f"data.train={place}/secret-place/mine.jsonl", "data.eval_fraction=0", "training.max_steps=1", "training.eval_strategy=no",
             f"training.output_dir={place / 'run'}"]  # fmt: skip
    run(Recipe.load("quickstart", [*SHORT, *words]))
    return place / "run"


@pytest.fixture
def changed(finished, tmp_path):
    """changed(edit) -> a copy of the run after edit(facts, recipe as a dict, adapter_config)."""

    def make(edit=lambda facts, recipe, adapter: None):
        folder = tmp_path / "quick"
        shutil.copytree(finished, folder, dirs_exist_ok=True)
        files = [folder / "run.json", folder / "recipe.yaml", folder / "adapter_config.json"]
        contents = [yaml.safe_load(f.read_text()) if f.suffix == ".yaml" else json.loads(f.read_text()) for f in files]
        edit(*contents)
        for file, content in zip(files, contents, strict=True):
            file.write_text(yaml.safe_dump(content) if file.suffix == ".yaml" else json.dumps(content))
        return folder

    return make


def on_hub(facts, recipe, adapter):
    """Base and data as if they had come from the hub."""
    recipe["model"] |= {"name_or_path": "org/base-7B", "revision": "main"}
    facts["base_model"] |= {"name_or_path": "org/base-7B", "hub_id": "org/base-7B", "commit": "0123abcd" * 5}
    facts["base_model"]["license"] = {"id": "other", "name": "base-license", "link": "LICENSE", "source": "README.md"}
    train, held = facts["data"]["sources"].values()
    facts["data"]["sources"] = {
        "org/pairs": train | {"path": "org/pairs", "files": []},
        "mine": train | {"path": "/home/me/private/mine.jsonl", "files": ["/home/me/private/mine.jsonl"]},
        "org/held": held | {"path": "org/held", "files": []},
    }
    source = recipe["data"]["train"][0]
    recipe["data"]["train"] = [source | {"path": "org/pairs"}, source | {"path": "/home/me/private/mine.jsonl"}]
    recipe["data"]["eval"] = [source | {"path": "org/held"}]
    recipe["training"] |= {"accelerator_config": "/home/me/private/accelerator.json"}
    facts["data"]["drops"]["notes"] = ["data.train: the row limit left /home/me/private/mine.jsonl unread"]


def front(card):
    """The front matter as a plain dict."""
    return ModelCard(card).data.to_dict()


def blocks(card, language=None):
    """Contents of the card's code blocks, by a CommonMark parser."""
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    return [t.content for t in tokens if t.type == "fence" and (language is None or t.info == language)]


def headings(card):
    tokens = MarkdownIt("commonmark").enable("table").parse(card.split("---\n", 2)[2])
    return [(t.tag, tokens[i + 1].content) for i, t in enumerate(tokens) if t.type == "heading_open"]


def test_a_card_of_a_record_whose_answers_are_lost(changed):
    card = model_card(changed(lambda facts, recipe, adapter: facts.pop("samples")))
    assert "greedy answers" not in card and "always preferring the longer answer" in card


def test_training_leaves_the_card_that_the_files_give(finished):
    card = (finished / "README.md").read_text("utf-8")
    assert card == model_card(finished)
    # run.json is written and read through one model: every field of it is known, and none is left out
    assert json.loads((finished / "run.json").read_text("utf-8")).keys() == RunRecord.model_fields.keys()
    assert not read_run(finished).notes
    assert (finished / "curves.png").is_file() and "(curves.png)" in card
    titles = [title for tag, title in headings(card) if tag == "h2"]
    assert titles == ["Results", "Sample answers", "How to load", "Data", "Training", "Hardware, time and versions",
                      "Notes", "Citation"]  # fmt: skip
    assert "arXiv:2403.07691" in card


SHOWN = [
    ("steps", 7321, "| optimizer steps | 7321 |"),
    ("effective_batch", 173, "| pairs per optimizer step | 173 |"),
    ("seed", 90210, "| seed | 90210 |"),
    ("device", "Some GPU 9000", "| device | Some GPU 9000 |"),
    ("train_seconds", 8123.4, "8,123.4 s"),
    ("total_seconds", 9321.7, "9,321.7 s"),
    ("pairs_per_second", 611.3, "611.3 pairs/s"),
    ("peak_memory_bytes", 12345678901, "12.35 GB"),
    ("adapter", "best by eval_loss: 1.2345 at step 77", "best by eval\\_loss: 1.2345 at step 77"),
    ("versions.torch", "9.8.7", "torch 9.8.7"),
    ("parameters.trainable", 55555, "55,555 of"),
    ("data.fingerprint", "f00d", "`f00d`"),
    ("data.train_pairs", 43210, "43,210 training pairs"),
    ("data.eval_pairs", 321, "321 held out"),
    ("data.drops", {"rows": 611, "kept": 600, "dropped": {"empty prompt": 7, "prompts differ": 4},
                    "truncated": {"prompt": 13, "completion": 0}, "notes": ["a *note*"]},
     "Rows left out: 11 of 611. By reason:\n\n| reason | rows |\n| --- | --- |\n| empty prompt | 7 |\n| prompts differ | 4 |"
     "\n\n- prompt cut in 13 pairs\n"),
    ("eval.before.rewards/accuracies", 0.3217, "| reward accuracy | 32.2% ("),
    ("eval.after.rewards/accuracies", 0.6173, "| 61.7% ("),
    ("eval.after.rewards/accuracies_interval", [0.5511, 0.6777], "(55.1% to 67.8%) |"),
    ("eval.after.rewards/margins_interval", [0.0123, 0.0456], "(0.0123 to 0.0456) |"),
    ("eval.after.rewards/margins", 3.14159, "| 3.1416 |"),
    ("eval.after.log_odds_chosen", 2.71828, "| 2.7183 |"),
    ("eval.after.nll_loss", 1.61803, "| 1.6180 |"),
    ("eval.after.loss", 1.41421, "| 1.4142 |"),
    ("eval.after.length_baseline", 0.6789, "| always preferring the longer answer | 67.9% |"),
    ("eval.after.pairs", 4321, "On 4,321 held-out pairs"),
    ("rule.after.chosen", 0.875, "| 87.5% |"),
    ("plan", {"peak_bytes": 11.25e9, "needed_bytes": 12e9}, "| peak memory, planned | 11.25 GB in tensors |"),
]  # fmt: skip


@pytest.mark.parametrize(("key", "value", "words"), SHOWN, ids=[key for key, _, _ in SHOWN])
def test_every_fact_is_read_from_run_json(finished, changed, key, value, words):
    def edit(facts, recipe, adapter):
        *parents, leaf = key.split(".")
        for parent in parents:
            facts = facts[parent]
        facts[leaf] = value

    assert words in model_card(changed(edit)) and words not in model_card(finished)


def test_no_number_comes_from_elsewhere(finished):
    """Numbers of the tables and sentences are those of run.json and recipe.yaml, in the formats that the card uses."""
    known = {"95", "16"}  # 95% intervals, the 16-bit base

    def collect(value):
        if isinstance(value, dict | list):
            for inner in value.values() if isinstance(value, dict) else value:
                collect(inner)
        elif isinstance(value, str):
            known.update(re.findall(r"\d+(?:\.\d+)*", value))
        elif isinstance(value, int | float) and not isinstance(value, bool):
            forms = (
                value,
                f"{value:,}",
                f"{value:.4f}",
                f"{value:.1%}"[:-1],
                f"{value:,.1f}",
                f"{value / 1e9:.2f}",
                f"{value:g}",
            )
            known.update(str(form).lstrip("-") for form in forms)

    collect(json.loads((finished / "run.json").read_text()))
    collect(yaml.safe_load((finished / "recipe.yaml").read_text()))
    body = model_card(finished).split("---\n", 2)[2]
    for block in (r"```.*?\n```", r"\]\([^)]*\)", r"</?[^>]*>", r"recipe\.yaml"):
        body = re.sub(block, "", body, flags=re.DOTALL)
    found = set(re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)*", body))
    assert len(found) > 20
    assert {n.rstrip(",") for n in found} - known == set()


def test_front_matter(changed):
    folder = changed(on_hub)
    (folder / "README.md").write_text(model_card(folder, repo="me/tuned"), "utf-8")
    data = metadata_load(folder / "README.md")
    results = data["model-index"][0].pop("results")
    assert data == {
        "base_model": "org/base-7B", "base_model_relation": "adapter", "datasets": ["org/pairs"], "library_name": "peft",
        "license": "other", "license_name": "base-license", "license_link": "https://huggingface.co/org/base-7B/blob/main/LICENSE",
        "pipeline_tag": "text-generation", "tags": ["orpo", "lora", "qlora"], "model-index": [{"name": "tuned"}],
    }  # fmt: skip
    after = json.loads((folder / "run.json").read_text())["eval"]["after"]
    assert results[0]["dataset"]["type"] == "org/held" and results[0]["dataset"]["name"].startswith("120 held-out")
    metrics = {m["type"]: m["value"] for m in results[0]["metrics"]}
    assert metrics == {"accuracy": after["rewards/accuracies"], "reward_margin": after["rewards/margins"],
                       "log_odds_ratio": after["log_odds_chosen"], "nll": after["nll_loss"], "loss": after["loss"]}  # fmt: skip


@pytest.mark.parametrize("kind", ["adapter", "merged", "gguf"])
def test_huggingface_hub_keeps_and_validates_the_card(changed, kind, monkeypatch):
    text = model_card(changed(on_hub), kind, repo="me/tuned", notes=["Merged onto the bfloat16 weights."])
    card = ModelCard(text)
    assert str(card) == text.rstrip("\n") + "\n" and len(card.data.eval_results) == 5
    seen = []

    class Hub(http.server.BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            seen.append((self.path, body))
            index = yaml.safe_load(body["content"].split("---\n")[1])["model-index"]
            sound = all(
                r["task"]["type"] and r["dataset"]["type"] and r["dataset"]["name"]
                and all(m["type"] and math.isfinite(m["value"]) for m in r["metrics"])
                for r in index[0]["results"]
            )  # fmt: skip
            self.send_response(200 if sound else 400)
            self.end_headers()

        def log_message(self, *args):
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
        card.validate()
        server.shutdown()
    assert seen == [("/api/validate-yaml", {"repoType": "model", "content": text})]


def test_merged_and_gguf_cards(changed):
    folder = changed(on_hub)
    merged, gguf = (
        model_card(folder, kind, repo="me/tuned", notes=["Merged <onto> x."]) for kind in ("merged", "gguf")
    )
    assert (front(merged)["library_name"], front(merged)["base_model_relation"]) == ("transformers", "finetune")
    assert (front(gguf)["library_name"], front(gguf)["base_model_relation"]) == ("gguf", "quantized")
    assert "gguf" in front(gguf)["tags"] and "ollama run hf.co/me/tuned" in gguf and "vllm" not in gguf
    assert 'from_pretrained("me/tuned"' in merged and "vllm serve me/tuned\n" in merged and "peft import" not in merged
    for card in (merged, gguf):
        assert "- Merged \\<onto\\> x." in card
        # what was measured is the adapter, not these weights
        assert "before merging" in front(card)["model-index"][0]["results"][0]["metrics"][0]["name"]
        assert "before merging" in card.partition("## Results")[2].partition("\n\n|")[0]
    other = front(model_card(folder, "merged", base="org/another"))
    assert other["base_model"] == "org/another" and "license" not in other


def test_nothing_of_this_machine_is_in_the_card(finished, whole, changed):
    for folder in (finished, whole, changed(on_hub)):
        card = model_card(folder)
        for words in (str(folder.parent), str(PACKAGE), "/home/", "secret-place", str(Path.home())):
            assert words not in card, words
    assert "mine.jsonl" in card and "accelerator.json" in card
    card = model_card(whole)
    assert "my-base" in card and "mine.jsonl" in card and "base_model" not in front(card)


def test_whole_model_without_held_out_pairs(whole):
    card = model_card(whole)
    data = front(card)
    assert (data["library_name"], data["tags"], data["license"]) == ("transformers", ["orpo"], "cc-by-4.0")
    assert "model-index" not in data and "Sample answers" not in card
    assert "license: cc-by-4.0 (the base model's, from README.md)" in card
    assert "No pairs were held out" in card and "peft import" not in card
    assert (whole / "curves.png").is_file()  # from a single line of metrics
    execute(blocks(card, "python")[0], whole)


def test_recipe_in_the_card_loads(finished, changed):
    (text,) = blocks(model_card(finished), "yaml")
    recipe = Recipe.parse(yaml.safe_load(text))
    original = Recipe.load(finished / "recipe.yaml")
    original.training.pop("output_dir")
    assert recipe == original
    (text,) = blocks(model_card(changed(on_hub)), "yaml")
    recipe = Recipe.parse(yaml.safe_load(text))
    assert [source.path for source in recipe.data.train] == ["org/pairs", "mine.jsonl"]
    assert recipe.model.name_or_path == "org/base-7B"
    folder = changed()
    recipe = Recipe.load(folder / "recipe.yaml", ["training.run_name='````'"])
    ticks = fence(published_recipe(recipe, read_run(folder).record), "yaml")
    assert len(MarkdownIt("commonmark").parse(ticks)) == 1


def test_samples_cannot_leave_their_fence(finished, changed):
    def edit(facts, recipe, adapter):
        facts["samples"] = {
            "before": [{"prompt": text, "answer": text[::-1]} for text in HOSTILE],
            "after": [{"prompt": text, "answer": text} for text in HOSTILE],
        }
        recipe["description"] = facts["device"] = " | ".join(HOSTILE[:3])
        facts["data"]["drops"] |= {"rows": 601, "dropped": {HOSTILE[0]: 1}}

    card = model_card(changed(edit))
    card.encode("utf-8")
    assert headings(card) == headings(model_card(finished))
    texts = blocks(card, "text")
    assert len(texts) == 12
    for i, hostile in enumerate(HOSTILE[:2]):
        assert texts[3 * i : 3 * i + 3] == [hostile + "\n", hostile[::-1] + "\n", hostile + "\n"]
    assert "\\u202eright to left\\u202c \u05e9\u05dc\u05d5\u05dd \\x00\\x1b[31m \\ud800 end" in texts[9]
    rendered = MarkdownIt("commonmark").enable("table").render(card.split("---\n", 2)[2])
    assert "<script>" not in rendered and "Pwned</h1>" not in rendered and rendered.count("<img") == 1
    assert front(card).get("license") == "apache-2.0"
    assert [len(re.findall(tag, rendered)) for tag in ("<table>\n<tr>", "</details>")] == [4, 1]


@pytest.mark.parametrize("text", [*HOSTILE[:3], "a|b", "*x* _y_ `z` [l](u) <b> &amp; ~~s~~ $m$",
                                  "- a", "1. a", "12) a", "+ a", "---", "- - -", "-0.5", "# a", "= a"])  # fmt: skip
def test_inline_text_stays_text(text):
    (opened, token, _) = MarkdownIt("commonmark").enable(["table", "strikethrough"]).parse(inline(text))
    assert opened.type == "paragraph_open" and {child.type for child in token.children} <= {"text", "text_special"}
    assert "".join(child.content for child in token.children) == " ".join(text.split())


def test_values_that_are_not_finite(changed):
    def edit(facts, recipe, adapter):
        facts["eval"]["after"] |= {
            "loss": float("nan"),
            "rewards/margins": float("inf"),
            "rewards/accuracies": math.nan,
        }

    card = model_card(changed(edit))
    assert (
        "| not a number |" in card and "| infinite |" in card and "is not a number" in card.partition("\n# ")[2][:200]
    )
    metrics = front(card)["model-index"][0]["results"][0]["metrics"]
    assert [metric["type"] for metric in metrics] == ["log_odds_ratio", "nll"]


def execute(code, folder):
    """Run a snippet of the card with the folder's path in place of its name; what it prints."""
    code = code.replace(f'"{folder.name}"', json.dumps(str(folder)))
    assert str(folder) in code
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(compile(code, "card", "exec"), {})
    return out.getvalue()


def test_peft_snippet_runs(finished):
    assert execute(blocks(model_card(finished), "python")[0], finished).strip()


def test_snippets_fit_the_model(changed):
    def own_code(facts, recipe, adapter):
        recipe["model"]["trust_remote_code"] = True

    for code in blocks(model_card(changed(own_code)), "python"):
        compile(code, "card", "exec")
        assert "trust_remote_code=True" in code

    def plain(facts, recipe, adapter):
        on_hub(facts, recipe, adapter)
        recipe["data"]["template_kwargs"] = {"enable_thinking": False}
        facts["base_model"]["quantization"] = recipe["model"]["quantization"] = "none"

    card = model_card(changed(plain), repo="me/tuned")
    code = blocks(card, "python")[0]
    compile(code, "card", "exec")
    assert "BitsAndBytes" not in code and "qlora" not in front(card)["tags"] and "enable_thinking=False" in code
    assert f'revision="{"0123abcd" * 5}"' in code and '"org/base-7B",' in code
    assert "16-bit base the answers" not in card
    serve = next(code for code in blocks(card, "bash") if "vllm" in code)
    assert serve.split()[:3] == ["vllm", "serve", "org/base-7B"] and "quickstart=me/tuned" in serve
    assert "hf download me/tuned --local-dir quickstart\npython -m orpo_lite.merge quickstart --output" in card
    for code in blocks(card, "bash"):
        subprocess.run(["bash", "-n"], input=code, text=True, check=True)


def test_vllm_commands_fit_the_adapter(changed):
    card = model_card(changed(lambda facts, recipe, adapter: adapter.update(r=48)))
    assert "--enable-lora --max-lora-rank 64" in card
    card = model_card(changed(lambda facts, recipe, adapter: adapter.update(use_dora=True, r=16)))
    assert "DoRA" in card and "serve the merged model" in card and "--enable-lora" not in card


def test_adapter_without_a_run(finished, tmp_path):
    folder = tmp_path / "bare"
    folder.mkdir()
    with pytest.raises(RequestError, match="neither run.json nor adapter_config.json"):
        model_card(folder)
    shutil.copy(finished / "adapter_model.safetensors", folder)
    config = json.loads((finished / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": "org/base", "r": 48}))
    card = model_card(folder)
    assert front(card) == {"base_model": "org/base", "base_model_relation": "adapter", "library_name": "peft",
                           "pipeline_tag": "text-generation", "tags": ["lora"]}  # fmt: skip
    assert "| r | 48 |" in card and "--max-lora-rank 64" in card and "license: see the base model" in card
    assert "not recorded" in card and "Results" not in card
    compile(blocks(card, "python")[0], "card", "exec")


def test_license_is_read_and_never_guessed(tmp_path, monkeypatch):
    assert find_license("mistralai/Mistral-7B-v0.1") is None
    assert find_license("builtin:quickstart/model")["id"] == "apache-2.0"
    folder = tmp_path / "base"
    folder.mkdir()
    assert find_license(str(folder)) is None
    (folder / "LICENSE").write_text("MIT License\n\nCopyright (c) 2026")
    for broken in ("---\nlicense: [unclosed\n---\n", "---\n- a list\n---\n", "no front matter"):
        (folder / "README.md").write_text(broken)
        assert find_license(str(folder)) is None
    (folder / "README.md").write_text("---\nlicense: other\nlicense_name: x\nlicense_link: LICENSE\n---\n")
    assert find_license(str(folder)) == {"id": "other", "name": "x", "link": "LICENSE", "source": "README.md"}
    # a repository that lies in the download cache
    commit = "a" * 40
    cached = tmp_path / "hub" / "models--org--base"
    (cached / "snapshots" / commit).mkdir(parents=True)
    (cached / "snapshots" / commit / "README.md").write_text("---\nlicense: gemma\n---\n")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    assert find_license("org/base", commit) == {"id": "gemma", "source": "README.md"}


def test_hub_ids(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "org" / "here").mkdir(parents=True)
    assert [hub_id(name) for name in ("org/base", "gpt2")] == ["org/base", "gpt2"]
    for name in ("org/here", "/abs/base", "./base", "~/base", "builtin:quickstart/model", "a/b/c", "bad name"):
        assert hub_id(name) is None, name


LINE = {"loss": 1.0, "nll_loss": 0.9, "log_odds_ratio": -0.7, "rewards/chosen": -0.1, "rewards/rejected": -0.2,
        "rewards/margins": 0.1, "rewards/accuracies": 0.6, "log_odds_chosen": 1.0, "learning_rate": 1e-4}  # fmt: skip


def draw_curves(lines, path):
    return draw_card_curves(LoadedRun(path.parent, Recipe.load("quickstart"), metrics=lines), path)


def ink(path):
    """For each of the six panels, how many pixels have each series' color."""
    picture = np.asarray(Image.open(path).convert("RGB"))
    assert picture.shape == (840, 1500, 3)
    panels = [part for row in np.split(picture, 2) for part in np.split(row, 3, axis=1)]
    colors = [
        [int(c[i : i + 2], 16) for i in (1, 3, 5)] for c in (COLORS[one][0] for one in (BLUE, ORANGE, GREEN, RED))
    ]
    return [[int((panel == color).all(-1).sum()) for color in colors] for panel in panels]


def test_picture_of_a_run(finished, tmp_path):
    loss, rewards, margin, accuracy, odds, rate = ink(finished / "curves.png")
    assert min(loss[:3]) > 100 and min(rewards[2:]) > 100  # ORPO loss, NLL and odds term; chosen and rejected
    assert all(min(panel[:2]) > 100 for panel in (odds, margin, accuracy))  # training pairs and held-out pairs
    assert rate[0] > 100 and rate[1:] == [0, 0, 0]
    assert draw_card_curves(read_run(finished), tmp_path / "again.png")
    assert (tmp_path / "again.png").read_bytes() == (finished / "curves.png").read_bytes()
    with Image.open(finished / "curves.png") as picture:
        assert picture.mode != "RGBA" or picture.getextrema()[3] == (255, 255)  # readable on a dark page too


def test_picture_of_little(tmp_path):
    path = tmp_path / "curves.png"
    assert not draw_curves([], path) and not draw_curves([{"step": 1, "epoch": 1.0}], path) and not path.exists()
    assert draw_curves([{"step": 1} | LINE], path)
    assert all(sum(panel) > 5 for panel in ink(path))
    assert draw_curves([{"step": 1} | LINE | {"loss": math.nan, "rewards/margins": math.inf}], path)
    assert ink(path)[2][0] == 0 and ink(path)[2][3] > 20  # no point, and red words that say so
    assert draw_curves([{"step": n} | LINE for n in range(1, 2001)], path)
    assert all(sum(panel) > 100 for panel in ink(path))


def test_picture_leaves_the_users_matplotlib_alone(tmp_path, monkeypatch):
    assert draw_curves([{"step": 1} | LINE], tmp_path / "plain.png")
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    monkeypatch.setitem(matplotlib.rcParams, "lines.linewidth", 7.5)
    monkeypatch.setitem(matplotlib.rcParams, "axes.facecolor", "black")
    names = set(matplotlib.rcParams) - {"backend"}  # to read it would import pyplot
    before = {name: matplotlib.rcParams[name] for name in names}
    assert draw_curves([{"step": 1} | LINE], tmp_path / "own.png")
    assert (tmp_path / "own.png").read_bytes() == (tmp_path / "plain.png").read_bytes()
    assert {name: matplotlib.rcParams[name] for name in names} == before and "matplotlib.pyplot" not in sys.modules
