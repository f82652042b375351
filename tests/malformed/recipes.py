"""Recipes and command lines that cannot be run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from tests.malformed.case import Case

GOOD = """\
name: mine
model: {name_or_path: builtin:quickstart/model, quantization: none}
data: {train: builtin:quickstart/train.jsonl, max_length: 256}
"""
BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{new}: &{new} [{', '.join([f'*{old}'] * 9)}]\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True)
)


def written(text: str | bytes, *overrides: str) -> Callable[[Path], list[str]]:
    """The command that trains a recipe of this text."""

    def make(folder: Path) -> list[str]:
        (folder / "mine.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        return ["train", "--recipe", "mine.yaml", *overrides]

    return make


def field(name: str, yaml: str, place: str, found: str, remedy: str) -> Case:
    """A good recipe with sections appended."""
    return Case(name, written(GOOD + yaml + "\n"), f"mine.yaml: {place}", found, remedy)


def line(*words: str) -> Callable[[Path], list[str]]:
    """A good recipe with overrides."""
    return written(GOOD, *words)


def under_a_file(folder: Path) -> list[str]:
    (folder / "file").write_text("not a folder")
    return [*written(GOOD)(folder), f"training.output_dir={folder / 'file' / 'run'}", "model.dtype=float32"]


def folder_without_recipe(folder: Path) -> list[str]:
    (folder / "run").mkdir()
    return ["train", "--recipe", "run"]


CASES = [
    field("number-as-word", "training: {learning_rate: fast}", "training.learning_rate", "found 'fast'", "valid number"),
    field("rank-as-word", "adapter: {r: sixteen}", "adapter.r", "found 'sixteen'", "valid integer"),
    field("rank-zero", "adapter: {r: 0}", "adapter.r", "found 0", "greater than or equal to 1"),
    field("flag-as-number", "orpo: {disable_dropout: 3}", "orpo.disable_dropout", "found 3", "boolean"),
    field("section-as-list", "orpo: [0.1]", "orpo: found [0.1]", "found [0.1]", "beta"),
    field("section-as-text", "memory: much", "memory: found 'much'", "found 'much'", "gpu_gb"),
    field("choice", "orpo: {layout: sharde}", "orpo.layout", "found 'sharde'", "'shared'"),
    field("beta-nan", "orpo: {beta: .nan}", "orpo.beta", "found nan", "finite number"),
    field("beta-inf", "orpo: {beta: .inf}", "orpo.beta", "found inf", "finite number"),
    field("beta-negative", "orpo: {beta: -0.1}", "orpo.beta", "found -0.1", "greater than or equal to 0"),
    field("learning-rate-nan", "training: {learning_rate: .nan}", "training.learning_rate", "found nan", "finite number"),
    field("learning-rate-negative", "training: {learning_rate: -1e-5}", "training.learning_rate", "found", "greater than 0"),
    field("nan-deep-in-a-variable", "training: {lr_scheduler_kwargs: {power: .nan}}",
          "training.lr_scheduler_kwargs.power", "found nan", "finite number"),
    field("seed-negative", "training: {seed: -1}", "training.seed", "found -1", "greater than or equal to 0"),
    field("weight-decay-negative", "training: {weight_decay: -0.1}", "training.weight_decay", "found -0.1", "greater than or equal to 0"),
    field("no-steps", "training: {max_steps: 0}", "training.max_steps", "found 0", "greater than 0 or -1"),
    field("steps-negative", "training: {max_steps: -5}", "training.max_steps", "found -5", "greater than 0 or -1"),
    field("sampling-of-no-kind", "training: {train_sampling_strategy: foo}", "training.train_sampling_strategy",
          "found 'foo'", "one of random, sequential"),
    field("sampling-of-another-kind", "training: {train_sampling_strategy: batch_rebalance}",
          "training.train_sampling_strategy", "found 'batch_rebalance'", "set orpo.tokens_per_batch instead"),
    field("tokens-seen-of-no-kind", "training: {include_num_input_tokens_seen: foo}",
          "training.include_num_input_tokens_seen", "found 'foo'", "one of all, non_padding"),
    field("optimizer-arguments", "training: {optim_args: garbage}", "training.optim_args", "found 'garbage'", "match pattern"),
    field("noise-negative", "training: {neftune_noise_alpha: -5}", "training.neftune_noise_alpha", "found -5", "greater than or equal to 0"),
    field("no-accumulation", "training: {eval_accumulation_steps: 0}", "training.eval_accumulation_steps", "found 0",
          "greater than 0"),
    field("no-checkpoint-kept", "training: {save_total_limit: 0}", "training.save_total_limit", "found 0", "greater than 0"),
    field("label-smoothing", "training: {label_smoothing_factor: 0.5}", "training.label_smoothing_factor", "found 0.5",
          "leave it out"),
    field("resume-in-a-recipe", "training: {resume_from_checkpoint: nope}", "training.resume_from_checkpoint",
          "found 'nope'", "--resume asks for it"),
    field("push-in-a-recipe", "training: {push_to_hub: true}", "training.push_to_hub", "found True",
          "python -m orpo_lite.push RUN --repo USER/NAME"),
    field("hub-in-a-recipe", "training: {hub_strategy: all_checkpoints}", "training.hub_strategy", "found 'all_checkpoints'",
          "python -m orpo_lite.push RUN --repo USER/NAME"),
    field("gpu-negative", "memory: {gpu_gb: -8}", "memory.gpu_gb", "found -8", "greater than 0"),
    field("pattern-broken", "adapter: {target_modules: '(q_proj'}", "adapter.target_modules", "'(q_proj'",
          "regular expression"),
    field("rule-broken", "evaluation: {rule: {chosen: '[', rejected: a}}", "evaluation.rule.chosen", "'['",
          "regular expression"),
    field("lone-surrogate", 'description: "\\ud83d"', "description", "half a character", "write the character itself"),
    field("nul-in-text", 'training: {output_dir: "runs\\0x"}', "training.output_dir", "NUL", "leave it out"),
    field("unknown-key", "orpo: {betta: 0.1}", "orpo.betta", "unknown key", "did you mean orpo.beta"),
    field("unknown-capital-key", "Beta: 0.1", "Beta", "unknown key", "did you mean orpo.beta?"),
    field("union-of-neither", "adapter: {target_modules: 5}", "adapter.target_modules", "found 5", "valid string"),
    field("unknown-training-key", "training: {learning_rat: 1e-5}", "training.learning_rat", "unknown key",
          "did you mean training.learning_rate"),
    field("key-without-section", "beta: 0.1", "beta", "unknown key", "did you mean orpo.beta?"),
    field("number-as-key", "7: 8", "7", "unknown key", "expected one of name"),
    Case("huge-integer", written(GOOD + f"training: {{max_steps: {'9' * 5000}}}\n"), "mine.yaml", "4300 digits",
         "not readable as YAML"),
    Case("no-model", written("data: {train: a.jsonl}\n"), "model: missing", "has no default", "name_or_path"),
    Case("no-sources", written(GOOD.replace("builtin:quickstart/train.jsonl", "[]")), "data.train", "found []",
         "at least 1 item"),
    Case("several-at-once", written(GOOD + "orpo: {beta: -1}\ntraining: {max_steps: few}\n"), "mine.yaml: 2 problems",
         "orpo.beta: found -1", "training.max_steps: found 'few'"),
    Case("billion-laughs", written(GOOD + BOMB), "mine.yaml, line", "alias", "write the values out"),
    Case("billion-laughs-in-a-field", written(GOOD + BOMB + "description: *l\n"), "mine.yaml, line", "alias",
         "write the values out"),
    Case("billion-merges", written(GOOD + "a: &a {x: 1}\n" + "".join(
        f"{new}: &{new} {{<<: [{', '.join([f'*{old}'] * 9)}]}}\n" for old, new in zip("abcdefghijk", "bcdefghijkl", strict=True))),
        "mine.yaml, line", "alias", "write the values out"),
    Case("cyclic-anchor", written(GOOD + "training: &t {output_dir: *t}\n"), "mine.yaml, line 4", "the alias *t",
         "write the values out"),
    Case("python-tag", written(GOOD + "description: !!python/object/apply:os.system ['touch owned']\n"),
         "mine.yaml, line 4", "python/object/apply:os.system", "remove the tag"),
    Case("own-tag", written(GOOD + "description: !mine text\n"), "mine.yaml, line 4", "!mine", "remove the tag"),
    Case("duplicate-key", written(GOOD + "orpo: {beta: 0.1, layout: packed, beta: 0.2}\n"), "mine.yaml, line 4",
         "beta stands twice", "keep one"),
    Case("duplicate-section", written(GOOD + "data: {train: other.jsonl}\n"), "mine.yaml, line 4", "data stands twice",
         "first on line 3"),
    Case("tabs", written("name: mine\nmodel:\n\tname_or_path: a/b\n"), "mine.yaml, line 3", "tab", "indent with spaces"),
    Case("unclosed", written("name: mine\nmodel: {name_or_path: a/b\ndata: {train: a.jsonl}\n"), "mine.yaml, line 3",
         "expected ',' or '}'", "fix"),
    Case("deep", written("a: " + "[" * 100_000), "mine.yaml", "nested too deeply", "sections such as model: and data:"),
    Case("empty", written(""), "mine.yaml", "is empty", "sections such as model: and data:"),
    Case("a-list", written("- model\n- data\n"), "mine.yaml", "a list", "sections such as model: and data:"),
    Case("two-documents", written(GOOD + "---\n" + GOOD), "mine.yaml, line 4", "another document", "keep one"),
    Case("utf-16", written(GOOD.encode("utf-16")), "mine.yaml, line 1", "not UTF-8", "save it as UTF-8"),
    Case("latin-1", written(GOOD.encode() + b"description: caf\xe9\n"), "mine.yaml, line 4", "not UTF-8", "save it as UTF-8"),
    Case("nul-bytes", written(GOOD.encode() + b"\0\0\0\0"), "mine.yaml, line 4", "#x0000", "special characters"),
    Case("a-binary", written(bytes(range(256)) * 4), "mine.yaml", "not UTF-8", "save it as UTF-8"),
    Case("no-such-recipe", lambda _: ["train", "--recipe", "mistral-qlroa"], "mistral-qlroa",
         "no recipe of this name", "did you mean mistral-qlora?"),
    Case("no-such-file", lambda _: ["train", "--recipe", "gone/mine.yaml"], "gone/mine.yaml", "no such file",
         "`orpo-lite recipes`"),
    Case("endless-name", lambda _: ["train", "--recipe", "a" * 5000], "aaaa", "no recipe of this name", "shipped: "),
    Case("no-run-folder", folder_without_recipe, "run: this folder", "no recipe.yaml", "run folder"),
    Case("override-value", line("orpo.beta=-1"), "command line: orpo.beta: ", "found -1",
         "greater than or equal to 0"),
    Case("empty-new-token", line("model.new_tokens=['']"), "command line: model.new_tokens.0: ", "found ''",
         "at least 1 character"),
    Case("split-of-a-file", line("data.split=train[:4]"), "builtin:quickstart/train.jsonl: data.split is 'train[:4]'",
         "a local file has no splits", "leave it out"),
    Case("best-of-no-metric", line("training.metric_for_best_model=accuracy"), "training.metric_for_best_model",
         "found 'accuracy'", "rewards/accuracies"),
    Case("best-without-a-metric", line("training.save_strategy=best"), "training.save_strategy (found 'best')",
         "metric_for_best_model", "correct it or remove it"),
    Case("batch-metrics", line("training.batch_eval_metrics=true"), "training.batch_eval_metrics (found True)",
         "not supported", "correct it or remove it"),
    Case("fsdp", line("training.fsdp=full_shard"), "training.fsdp", "FSDP is asked for", "recipes/accelerate/ddp.yaml"),
    Case("parameters-of-no-layer", line("adapter.target_parameters=[nope]"), "adapter.target_parameters",
         "no parameter called nope", "it has "),
    Case("override-key", line("orpo.betta=1"), "command line: orpo.betta: ", "unknown key", "did you mean orpo.beta"),
    Case("override-nan", line("training.learning_rate=.nan"), "command line: training.learning_rate: ",
         "found nan", "finite number"),
    Case("override-without-value", line("training.learning_rate"), "command line", "'training.learning_rate'", "key=value"),
    Case("override-of-no-section", line("name.x=1"), "command line", "name is not a section", "name is 'mine'"),
    Case("override-broken", line("data.train=[a"), "command line", "data.train=[a", "not readable as YAML"),
    Case("override-tag", line("description=!!python/name:os.system x"), "command line", "python/name:os.system",
         "remove the tag"),
    Case("override-and-file", written(GOOD + "orpo: {layout: round}\n", "orpo.beta=-1"), "mine.yaml: 2 problems",
         "orpo.layout: found 'round'", "command line, orpo.beta: found -1"),
    Case("lengths-that-clash", line("data.max_prompt_length=256"), "command line", "data.max_prompt_length (256)",
         "make it smaller"),
    Case("full-tuning-in-4-bits", line("adapter=null", "model.quantization=nf4"), "command line",
         "model.quantization is nf4", "model.quantization=none"),
    Case("output-under-a-file", under_a_file, "training.output_dir", "Not a directory", "choose another"),
]  # fmt: skip
