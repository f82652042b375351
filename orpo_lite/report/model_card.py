"""A card put together: of a run, or of an adapter of which nothing else is known."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from huggingface_hub import ModelCardData
from rich.markup import escape

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.markdown import fence, inline, table
from orpo_lite.data.row_shapes import FAMILY
from orpo_lite.recipe import Recipe
from orpo_lite.report import verdict
from orpo_lite.report.card_curves import draw_curves
from orpo_lite.report.card_metadata import card_data, eval_results
from orpo_lite.report.card_sections import (
    citation,
    data_section,
    hyperparameters,
    limits,
    link,
    origin,
    results_section,
    run_rows,
    samples_section,
)
from orpo_lite.report.card_usage import Artefact, adapter_usage, gguf_usage, model_usage, read_json
from orpo_lite.report.licence import find_licence
from orpo_lite.report.published_recipe import base_name, hub_id, shareable
from orpo_lite.trainer.run_folder import RunFolder

if TYPE_CHECKING:
    from orpo_lite.trainer.trainer import ORPOTrainer

Kind = Literal["adapter", "merged", "gguf"]


def write_card(folder: RunFolder) -> None:
    """Write README.md and its picture, curves.png, into a finished run folder.

    A picture that cannot be drawn is said on screen and left out of the card: it is no reason to fail a run.
    """
    facts, path = folder.read(), folder.path / "curves.png"
    path.unlink(missing_ok=True)
    try:
        text = folder.metrics.read_text("utf-8") if folder.metrics.is_file() else ""
        lines = [json.loads(line) for line in text.splitlines()]
        if not draw_curves(lines, path, (facts["eval"]["after"] or {}).get("length_baseline")):
            console.print("no curves.png: metrics.jsonl holds no metrics (training.logging_strategy, eval_strategy)")
    except Exception as error:  # a font, a full disk, a broken matplotlib
        path.unlink(missing_ok=True)
        console.print(
            f"curves.png could not be drawn, the card goes without: {escape(f'{type(error).__name__}: {error}')}"
        )
    (folder.path / "README.md").write_text(model_card(folder.path), "utf-8")


def model_card(
    source: str | Path,
    kind: Kind = "adapter",
    *,
    repo: str | None = None,
    notes: Sequence[str] = (),
    base: str | None = None,
) -> str:
    """README.md of an adapter, or of the merged model or GGUF file made from it.

    The card shows curves.png where the source has one: copy it along where the card goes elsewhere.

    Args:
        source: run folder, or a folder of PEFT's alone, of which only base and shape of the adapter are known.
        kind: what the card lies beside. The folder of a full fine-tuning is a whole model under "adapter" too.
        repo: hub repository that the commands name; default: the folder's name.
        notes: sentences for the notes, such as what was merged onto which weights.
        base: hub id or folder of the base that the adapter was merged into, where it is not the one it was trained on.

    Raises:
        RequestError: neither a finished run nor an adapter folder.
    """
    source = Path(source)
    if (source / "run.json").is_file():
        return run_card(RunFolder.open(source), kind, repo, notes, base)
    if not (source / "adapter_config.json").is_file():
        raise RequestError(
            f"{source}: found neither run.json nor adapter_config.json, expected a finished run folder or an adapter "
            "folder to make a model card from"
        )
    return bare_card(source, kind, repo, notes, base)


def run_card(folder: RunFolder, kind: Kind, repo: str | None, notes: Sequence[str], base: str | None) -> str:
    recipe, facts = folder.recipe(), folder.read()
    # run.json had none of these at first
    known = {"hub_id": hub_id(recipe.model.name_or_path), "licence": None, "quantization": recipe.model.quantization}
    known = facts["base_model"] = known | facts["base_model"]
    if kind == "adapter" and recipe.adapter is None:
        kind = "merged"
    hub, licence, revision = known["hub_id"], known["licence"], known["commit"] or known["revision"]
    if base is not None:
        hub, licence, revision = hub_id(base), find_licence(base), None
    shown = base_name(base or recipe.model.name_or_path, hub is not None)
    quantised = known["quantization"] != "none"
    tags = ["orpo"] + (["lora"] if recipe.adapter else [])
    tags += ["qlora"] if quantised and known["quantization"] != "int8" else []
    sources = facts["data"]["sources"].values()
    results = eval_results(facts, recipe, kind)
    meta = card_data(
        kind, name=repo.rpartition("/")[2] if repo else facts["name"], base=hub, licence=licence, tags=tags,
        datasets=sorted({s["path"] for s in sources if s["section"] == "train" and not s["files"]}), results=results,
    )  # fmt: skip
    it = artefact(folder, recipe, facts, repo, shown, hub is not None, revision)
    what = {"adapter": "LoRA adapter for", "merged": "Made from", "gguf": "GGUF file, made from"}[kind]
    sections = [
        f"# {inline(facts['name'])}",
        verdict(facts),
        inline(recipe.description),
        f"{what} {link(shown, hub)}, trained with [ORPO](https://arxiv.org/abs/2403.07691) by orpo-lite "
        f"{facts['versions']['orpo-lite']}.",
        origin(shown, hub, revision, licence, known["quantization"]),
        "## Results",
        results_section(recipe, facts, kind),
        "![loss, odds-ratio term, rewards, margin, accuracy and learning rate over the steps](curves.png)"
        if (folder.path / "curves.png").is_file()
        else "",
        samples_section(facts["samples"]),
        "## How to load",
        usage(it, kind, repo),
        "## Data",
        data_section(recipe, facts),
        "## Training",
        table(hyperparameters(recipe, facts), ("hyperparameter", "value")),
        "<details>\n<summary>The recipe: python -m orpo_lite.train --recipe recipe.yaml repeats the run</summary>",
        fence(shareable(recipe, facts).rstrip(), "yaml"),
        "</details>",
        "## Hardware, time and versions",
        table(run_rows(facts), ("", "")),
        "## Notes",
        "\n".join(f"- {line}" for line in [*map(inline, notes), *limits(recipe, facts, kind)]),
        citation(),
    ]
    return assemble(meta, sections)


def bare_card(source: Path, kind: Kind, repo: str | None, notes: Sequence[str], base: str | None) -> str:
    """What adapter_config.json alone tells."""
    config = read_json(source / "adapter_config.json")
    trained_on, name = config.get("base_model_name_or_path") or "", source.resolve().name
    named = base or trained_on
    hub = hub_id(named) if named else None
    shown = base_name(named, hub is not None) if named else "a base that adapter_config.json does not name"
    revision = config.get("revision") if base is None else None
    licence = find_licence(named, revision) if named else None
    meta = card_data(kind, name=name, base=hub, licence=licence, tags=["lora"])
    it = Artefact(repo or name, command_name(name), shown if named else "BASE", hub is not None, revision=revision,
                  **weights_facts(source), chat=has_template(source))  # fmt: skip
    targets = config.get("target_modules") or []
    rows = [("type", config.get("peft_type")), ("r", config.get("r")), ("alpha", config.get("lora_alpha")),
            ("target modules", targets if isinstance(targets, str) else ", ".join(sorted(targets))),
            ("modules to save", ", ".join(config.get("modules_to_save") or [])),
            ("DoRA", config.get("use_dora")), ("rsLoRA", config.get("use_rslora"))]  # fmt: skip
    sections = [
        f"# {inline(name)}",
        f"{'LoRA adapter for' if kind == 'adapter' else 'Made from'} {link(shown, hub)}.",
        origin(shown, hub, revision, licence, None),
        "How the adapter was trained is not recorded beside it: this card was made from adapter_config.json alone.",
        table(((key, inline(str(value))) for key, value in rows if value not in (None, "", False)), ("adapter", "")),
        "## How to load",
        usage(it, kind, repo),
        "## Notes\n\n" + "\n".join(f"- {inline(note)}" for note in notes) if notes else "",
        citation(),
    ]
    return assemble(meta, sections)


def assemble(meta: ModelCardData, sections: list[str]) -> str:
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{meta.to_yaml()}\n---\n\n{body}\n"


def artefact(
    folder: RunFolder, recipe: Recipe, facts: dict[str, Any], repo: str | None, base: str, on_hub: bool, revision: Any
) -> Artefact:
    shapes = {FAMILY.get(source["shape"]) for source in facts["data"]["sources"].values()}
    return Artefact(
        where=repo or folder.path.resolve().name,
        name=command_name(facts["name"]),
        base=base,
        on_hub=on_hub,
        revision=revision,
        quantization=facts["base_model"]["quantization"],
        double_quant=recipe.model.double_quant,
        dtype=facts["base_model"]["dtype"],
        gguf_file=recipe.model.gguf_file and Path(recipe.model.gguf_file).name,
        trust_remote_code=recipe.model.trust_remote_code,
        chat=has_template(folder.path) and (recipe.data.apply_template or "conversations" in shapes),
        template_kwargs=recipe.data.template_kwargs,
        **weights_facts(folder.path),
    )


def weights_facts(folder: Path) -> dict[str, Any]:
    """What the configuration beside the weights says to an Artefact."""
    from orpo_lite.common.vllm import vllm_problems, vllm_rank

    adapter = read_json(folder / "adapter_config.json")
    if not adapter:
        return {"seq2seq": bool(read_json(folder / "config.json").get("is_encoder_decoder"))}
    problems = [problem.replace(str(folder), folder.name) for problem in vllm_problems(folder)]
    return {
        "seq2seq": adapter.get("task_type") == "SEQ_2_SEQ_LM",
        "new_tokens": bool(adapter.get("trainable_token_indices")),
        "vllm_problems": problems,
        "vllm_rank": 0 if problems else vllm_rank(folder),
    }


def usage(it: Artefact, kind: Kind, repo: str | None) -> str:
    if kind == "gguf":
        return gguf_usage(it, repo)
    return adapter_usage(it) if kind == "adapter" else model_usage(it)


def command_name(name: str) -> str:
    """A name that every command takes: Ollama wants lower case."""
    return "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lower()


def has_template(folder: Path) -> bool:
    return (folder / "chat_template.jinja").is_file() or bool(
        read_json(folder / "tokenizer_config.json").get("chat_template")
    )


# ---- of a trainer that is used on its own ------------------------------------------------------------------------------


def write_trainer_card(
    trainer: ORPOTrainer,
    model_name: str | None = None,
    dataset_name: str | None = None,
    tags: str | list[str] | None = None,
) -> None:
    """Write README.md into `args.output_dir` of a trainer that has no run folder.

    Args:
        model_name: title of the card; default: the name of the folder.
        dataset_name: what the model was trained on; linked where it is a dataset on the hub.
        tags: added to the card's own.
    """
    from peft import PeftModel

    args, model = trainer.args, trainer.unwrapped()
    folder = Path(str(args.output_dir))
    folder.mkdir(parents=True, exist_ok=True)
    named = model.config._name_or_path or ""
    hub = hub_id(named) if named else None
    name = model_name or folder.resolve().name
    adapter = isinstance(model, PeftModel)
    given = [tags] if isinstance(tags, str) else tags or []
    meta = card_data(
        "adapter" if adapter else "merged", name=name, base=hub, licence=None,
        tags=sorted({*given, "orpo", "orpo-lite", *(["lora"] if adapter else [])}),
        datasets=[dataset_name] if dataset_name and hub_id(dataset_name) else None,
    )  # fmt: skip
    shown = base_name(named, hub is not None) if named else "a model of its own"
    logged = {key: value for log in trainer.state.log_history for key, value in log.items()}
    last = ("loss", "eval_loss", "eval_rewards/accuracies", "eval_rewards/margins")
    pairs = args.train_batch_size * args.gradient_accumulation_steps * args.world_size
    rows = [("steps", str(trainer.state.global_step)), ("pairs a step", str(pairs)), ("beta", f"{trainer.beta:g}"),
            ("learning rate", f"{args.learning_rate:g}"),
            *((inline(key), f"{logged[key]:.4f}") for key in last if key in logged)]  # fmt: skip
    packages = ("torch", "orpo-lite", "transformers", "peft", "datasets")
    versions = {"python": platform.python_version()} | {package: version(package) for package in packages}
    sections = [
        f"# {inline(name)}",
        f"{'LoRA adapter for' if adapter else 'Made from'} {link(shown, hub)}, trained with "
        f"[ORPO](https://arxiv.org/abs/2403.07691){f' on {inline(dataset_name)}' if dataset_name else ''}.",
        table(rows, ("training", "")),
        table(((key, inline(value)) for key, value in versions.items()), ("version", "")),
        citation(),
    ]
    (folder / "README.md").write_text(assemble(meta, sections), "utf-8")
