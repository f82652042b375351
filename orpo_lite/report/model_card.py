"""Model cards: of a run, and of an adapter of which nothing else is known; and curves.png."""

from __future__ import annotations

import json
import logging
import shlex
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any, Literal

import jinja2
import yaml
from huggingface_hub import EvalResult, HfApi, ModelCardData, hf_hub_download, metadata_load
from huggingface_hub.errors import EntryNotFoundError, HFValidationError
from huggingface_hub.utils import validate_repo_id

from orpo_lite.common.console import console
from orpo_lite.common.errors import RequestError
from orpo_lite.common.text import cut, fence, format_gb, inline, measured, number
from orpo_lite.data.row_shapes import FAMILY
from orpo_lite.evaluate.held_out import ROWS
from orpo_lite.recipe import Recipe
from orpo_lite.recipe.loading import BUILTIN, looks_local
from orpo_lite.report.charts import draw_card_curves
from orpo_lite.report.drawing import is_finite
from orpo_lite.report.page import read_json, verdict
from orpo_lite.trainer.run_folder import RunFolder
from orpo_lite.trainer.run_record import RunRecord, read_run

logger = logging.getLogger(__name__)

Kind = Literal["adapter", "merged", "gguf"]

METRICS = {
    "rewards/accuracies": "accuracy",
    "rewards/margins": "reward_margin",
    "log_odds_chosen": "log_odds_ratio",
    "nll_loss": "nll",
    "loss": "loss",
}
"""Evaluation's name of a metric -> its type in the model index."""
RELATIONS = {"adapter": "adapter", "merged": "finetune", "gguf": "quantized"}
LIBRARIES = {"adapter": "peft", "merged": "transformers", "gguf": "gguf"}


def draw_picture(folder: RunFolder) -> None:
    """Draw curves.png, the card's picture, into a finished run folder; a line says why where there is nothing to draw."""
    path = folder.path / "curves.png"
    path.unlink(missing_ok=True)
    if not draw_card_curves(read_run(folder), path):
        console.print("no curves.png: metrics.jsonl holds no metrics (training.logging_strategy, eval_strategy)")


def write_card(folder: RunFolder) -> None:
    """Write README.md into a finished run folder."""
    (folder.path / "README.md").write_text(model_card(folder.path), "utf-8")


def model_card(
    source: str | Path,
    kind: Kind = "adapter",
    *,
    repo: str | None = None,
    notes: Sequence[str] = (),
    base: str | None = None,
) -> str:
    """Return README.md of an adapter, or of the merged model or GGUF file made from it.

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
    """Return the card of a finished run."""
    recipe, run = folder.recipe(), read_run(folder)
    record, facts = run.record, run.record.base_model
    held = facts.quantization or "none"
    if kind == "adapter" and recipe.adapter is None:
        kind = "merged"
    hub, license, revision = facts.hub_id, facts.license, facts.commit or facts.revision
    if base is not None:
        hub, license, revision = hub_id(base), find_license(base), None
    shown = public_name(base or recipe.model.name_or_path, hub is not None)
    name, given = record.name or folder.path.resolve().name, published_recipe(recipe, record)
    it = usage_facts(folder.path, repo, name, shown, revision, recipe, held, facts.dtype or "auto")
    tags = ["orpo"] + (["lora"] if recipe.adapter else []) + (["qlora"] if it["quantizer"] else [])
    sources = record.data.sources.values()
    datasets = sorted({one.path for one in sources if one.section == "train" and one.path and not one.files})
    meta = front_matter(kind, hub, license, tags, datasets=datasets or None)
    if results := eval_results(record, recipe, kind):
        meta.model_name, meta.eval_results = repo.rpartition("/")[2] if repo else name, results
    shapes = {FAMILY.get(one.shape or "") for one in sources}
    it["chat"] = it["chat"] and (recipe.data.apply_template or "conversations" in shapes)
    return render(
        meta, name=name, kind=kind, shown=shown, hub=hub, license=license, trained=True, it=it, held=held,
        record=record, recipe=recipe, verdict=verdict(run), repo=repo, notes=notes,
        has_curves=(folder.path / "curves.png").is_file(),
        samples=list(zip(record.samples.get("before", []), record.samples.get("after", []), strict=False)),
        recipe_yaml=given.rstrip(),
    )  # fmt: skip


def bare_card(source: Path, kind: Kind, repo: str | None, notes: Sequence[str], base: str | None) -> str:
    """Return the card of a folder of which only adapter_config.json is known."""
    config = read_json(source / "adapter_config.json")
    name, named = source.resolve().name, base or config.get("base_model_name_or_path") or ""
    hub, revision = hub_id(named) if named else None, config.get("revision") if base is None else None
    license = find_license(named, revision) if named else None
    shown = public_name(named, hub is not None) if named else "a base that adapter_config.json does not name"
    return render(
        front_matter(kind, hub, license, ["lora"]),
        name=name, kind=kind, shown=shown, hub=hub, license=license, repo=repo, notes=notes, config=config,
        it=usage_facts(source, repo, name, shown if named else "BASE", revision),
    )  # fmt: skip


# ---- rendering -----------------------------------------------------------------------------------------------------------


class Markdown(str):
    """Text that is Markdown already."""


def escaped(value: Any) -> Markdown:
    """Escape what a template puts into the card, so that no text of recipe, data or model is read as Markdown."""
    return value if isinstance(value, Markdown) else Markdown("not known" if value is None else inline(str(value)))


@cache
def environment() -> jinja2.Environment:
    made = jinja2.Environment(  # noqa: S701  # not HTML: `escaped` sees every value
        loader=jinja2.PackageLoader("orpo_lite.report", ""), undefined=jinja2.StrictUndefined, finalize=escaped,
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    made.globals |= {"metrics": ROWS, "hub_id": hub_id}
    made.filters |= {
        "md": Markdown,
        "py": lambda value: Markdown(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)),
        "sh": lambda text: Markdown(shlex.quote(text)),
        "fence": lambda text, language="text": Markdown(
            fence(text.strip("\n") if language != "text" else text, language)
        ),
        "number": lambda value, form: Markdown(number(value, form)),
        "count": lambda value: Markdown(number(value, ",")),
        "gigabytes": lambda size: None if size is None else format_gb(size, 2),
        "measured": lambda result, key: Markdown(measured(result, key) or "not known"),
        "link": lambda name, hub: Markdown(f"[{inline(name)}](https://huggingface.co/{hub})" if hub else inline(name)),
        "public_name": public_name,
        "cut": cut,
    }
    return made


def render(meta: ModelCardData, **parts: Any) -> str:
    """Render a card: front matter, and every section for which there is something."""
    nothing: dict[str, Any] = dict.fromkeys(("record", "recipe", "it", "config", "repo", "license", "held"))
    nothing |= {"trained": False, "notes": ()}
    return f"---\n{meta.to_yaml()}\n---\n\n{environment().get_template('card.md.jinja').render(nothing | parts)}"


# ---- front matter --------------------------------------------------------------------------------------------------------


def front_matter(
    kind: Kind, base: str | None, license: dict[str, str] | None, tags: list[str], **more: Any
) -> ModelCardData:  # fmt: skip
    """Return the front matter in huggingface_hub's own classes, so that the hub accepts it; `base` is a hub id or None."""
    license = license or {}
    if base:
        more["base_model_relation"] = RELATIONS[kind]
    if link := license.get("link"):
        if "://" not in link:  # a file of the base's repository
            link = f"https://huggingface.co/{base}/blob/main/{link}" if base else None
        more["license_link"] = link
    return ModelCardData(
        base_model=base,
        library_name=LIBRARIES[kind],
        pipeline_tag="text-generation",
        tags=[*tags, *(["gguf"] if kind == "gguf" else [])],
        license=license.get("id"),
        license_name=license.get("name"),
        **more,
    )


def eval_results(record: RunRecord, recipe: Recipe, kind: Kind) -> list[EvalResult]:
    """Return the evaluation after training for the model index; what is not a finite number is left out."""
    before, after = record.evaluation("before"), record.evaluation("after")
    if not before or not after:
        return []
    section = "eval" if recipe.data.eval else "train"
    sources = [source for source in record.data.sources.values() if source.section == section and source.path]
    on_hub = [str(source.path) for source in sources if not source.files]
    names = ", ".join(public_name(str(source.path), not source.files) for source in sources)
    of_what = "" if kind == "adapter" or recipe.adapter is None else ", adapter on its base before merging"
    results = []
    for key, metric in METRICS.items():
        if not is_finite(after.get(key)):
            continue
        results.append(
            EvalResult(
                task_type="text-generation",
                task_name="preference pairs",
                dataset_type=on_hub[0] if len(on_hub) == len(sources) == 1 else "preference-pairs",
                dataset_name=f"{after.get('pairs')} held-out pairs of {names}",
                metric_type=metric,
                metric_name=f"{ROWS[key][0].upper()}{ROWS[key][1:]}{of_what}",
                metric_value=after.get(key),
            )
        )
    return results


# ---- facts for the sections ----------------------------------------------------------------------------------------------


def usage_facts(
    folder: Path, repo: str | None, name: str, base: str, revision: str | None,
    recipe: Recipe | None = None, quantization: str = "none", dtype: str = "auto",
) -> dict[str, Any]:  # fmt: skip
    """Return what the snippets under "How to load" need to know.

    Args:
        base: hub id, builtin:..., or the name of a local folder.
        quantization: how the base is held on loading, as in training.
    """
    from orpo_lite.report.vllm import vllm_problems, vllm_rank

    adapter = read_json(folder / "adapter_config.json")
    problems = [problem.replace(str(folder), folder.name) for problem in vllm_problems(folder)] if adapter else []
    # a name that every command takes: Ollama wants lower case
    plain = "".join(c if c.isascii() and (c.isalnum() or c in "._-") else "-" for c in name).lower()
    template = read_json(folder / "tokenizer_config.json").get("chat_template")
    settings = None
    if recipe and quantization in ("nf4", "fp4"):
        import torch

        from orpo_lite.model.precision import four_bits

        spec = recipe.model.model_copy(update={"quantization": quantization})
        settings = four_bits(spec, getattr(torch, dtype, torch.float32))
    options = settings.to_diff_dict() if settings else {}
    return {
        "where": repo or folder.resolve().name, "name": plain, "base": base, "revision": revision,
        "builtin": base.startswith(BUILTIN),
        "chat": bool(template) or (folder / "chat_template.jinja").is_file(), "vllm_problems": problems,
        "vllm_rank": vllm_rank(folder) if adapter and not problems else 0,
        "new_tokens": bool(adapter.get("trainable_token_indices")), "dtype": dtype,
        "quantizer": type(settings).__name__ if settings else None,
        "quantizer_options": {key: value for key, value in options.items() if key[0] != "_" and key != "quant_method"},
    }  # fmt: skip


# ---- what may be published -----------------------------------------------------------------------------------------------


def hub_id(name: str) -> str | None:
    """Return the name if it can only be a repository on the hub, else None (a local folder, builtin:...)."""
    if looks_local(name) or Path(name).is_dir():
        return None
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name


def public_name(name: str, on_hub: bool) -> str:
    """Return a base or data set as others may see it: a hub id or builtin name as it is, a local path by its last part."""
    return name if on_hub or name.startswith(BUILTIN) else last_part(name)


def last_part(path: str) -> str:
    """Return the name of the file or folder, of `.` and `..` too."""
    path = path.replace("\\", "/")
    return path.rstrip("/").rpartition("/")[2] if path.strip("./") else Path(path or ".").resolve().name


def hub_has_readme(base: str, revision: str | None) -> bool:
    """Ask the hub once: a download would ask it for 23 seconds where it cannot be reached."""
    try:
        return HfApi().file_exists(base, "README.md", revision=revision)
    except Exception as error:  # of whichever HTTP client the hub's library uses
        logger.debug("README.md of %s: %s", base, error)
        return False


def find_license(base: str, revision: str | None = None) -> dict[str, str] | None:
    """Read which license a base model states: {"id", "name", "link", "source"}, or None where it states none.

    It is read from the front matter of its README.md, in its folder or in its repository on the hub (through the cache; a
    hub that cannot be reached is no error), and never guessed.

    Args:
        base: hub id, folder, or builtin:...
        revision: commit of a hub id.
    """
    if base.startswith(BUILTIN):
        return {"id": "apache-2.0", "source": "orpo-lite, which ships it"}
    try:
        readme = Path(base).expanduser() / "README.md"
        if hub_id(base) is not None:
            known = hub_has_readme(base, revision)
            readme = hf_hub_download(base, "README.md", revision=revision, local_files_only=not known)
        data = metadata_load(readme)
    except (EntryNotFoundError, OSError, ValueError, yaml.YAMLError) as error:
        logger.debug("license of %s: %s", base, error)
        return None
    data = data or {}
    stated = data.get("license")
    if isinstance(stated, list) and len(stated) == 1:
        stated = stated[0]
    if not stated or not isinstance(stated, str):
        return None
    more = {key: str(data[f"license_{key}"]) for key in ("name", "link") if data.get(f"license_{key}")}
    return {"id": stated, "source": "README.md"} | more


def published_recipe(recipe: Recipe, record: RunRecord) -> str:
    """Return the recipe as YAML that loads, local paths cut to their last part; the output folder left out."""
    content = recipe.model_dump(mode="json")
    content["training"].pop("output_dir", None)
    local = {source.path for source in record.data.sources.values() if source.files}
    local |= {recipe.model.name_or_path} if record.base_model.hub_id is None else set()

    def public(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: public(one) for key, one in value.items()}
        if isinstance(value, list):
            return [public(one) for one in value]
        is_path = isinstance(value, str) and (value in local or looks_local(value) or Path(value).is_dir())
        return public_name(value, on_hub=False) if is_path else value

    content |= {section: public(content[section]) for section in ("model", "adapter", "data", "training")}
    return yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
