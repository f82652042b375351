"""What a path names: a run, an adapter or a whole model. Nothing is loaded yet."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from orpo_lite.common.errors import RequestError
from orpo_lite.model.locating import adapter_folder, looks_local
from orpo_lite.recipe import ModelSection, Recipe
from orpo_lite.recipe.loading import resolve_path
from orpo_lite.trainer.run_folder import RunFolder, base_section

EXPECTED = "expected a run folder, the folder of an adapter or of a model, or a hub id USER/NAME"


@dataclass
class Found:
    """Where the weights are, and what is known of how they were trained."""

    path: str
    """The folder, or the hub id of a whole model."""
    kind: Literal["adapter", "fine-tuned", "model"]
    """fine-tuned: a run without an adapter; model: any other whole model, such as a merged one."""
    model: ModelSection
    """The base of an adapter, or the whole model."""
    base: ModelSection | None = None
    """What a fine-tuned model was before."""
    recipe: Recipe | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    """run.json, where there is one."""

    @property
    def names(self) -> tuple[str, ...]:
        """The sides that can answer, the trained one last."""
        return ("model",) if self.kind == "model" else ("base", self.kind)


def find(path: str, trust_remote_code: bool = False) -> Found:
    """What a path or hub id names.

    Code of a repository is run only where the caller says so: the folder may be anybody's.

    Raises:
        RequestError: nothing of the kind, or a run that did not finish.
    """
    folder = Path(os.path.expanduser(resolve_path(path)))
    if os.path.isfile(folder):
        hint = "; talk to a GGUF file with llama-cli or Ollama" if folder.suffix == ".gguf" else ""
        raise RequestError(f"{path} is a file, {EXPECTED}{hint}")
    if not os.path.isdir(folder):
        if looks_local(path):
            raise RequestError(f"{path}: there is no such folder: {EXPECTED}")
        downloaded = adapter_folder(path)
        if not (downloaded / "adapter_config.json").is_file():
            return Found(path, "model", whole(path, trust_remote_code))
        folder = downloaded
    recipe = facts = None
    if (folder / "recipe.yaml").is_file():
        recipe = RunFolder.open(folder).recipe()
        # run.json stays at home when a run is published, its card goes along; a run that has neither did not finish
        facts = None if not (folder / "run.json").is_file() and published(folder) else RunFolder(folder).read()
    if (folder / "adapter_config.json").is_file():
        base = base_section(folder, None, trust_remote_code)
        return Found(str(folder), "adapter", base, recipe=recipe, facts=facts or {})
    if (folder / "config.json").is_file():
        if recipe is None or recipe.adapter is not None:
            return Found(str(folder), "model", whole(str(folder), trust_remote_code))
        before = recipe.model.model_copy(update={"trust_remote_code": trust_remote_code})
        after = whole(str(folder), trust_remote_code).model_copy(update={"dtype": recipe.model.dtype})
        return Found(str(folder), "fine-tuned", after, before, recipe, facts or {})
    if recipe is not None:
        RunFolder(folder).read()  # says that the run did not finish
        raise RequestError(f"{path}: the run is finished, but its adapter_config.json is gone: copy the folder again")
    raise RequestError(f"{path}: holds neither adapter_config.json nor config.json: {EXPECTED}")


def published(folder: Path) -> bool:
    """Whether it holds a run's model card, which PEFT's own are not."""
    card = folder / "README.md"
    return card.is_file() and "\n- orpo\n" in card.read_text("utf-8", "replace").partition("\n---\n")[0]


def whole(path: str, trust_remote_code: bool) -> ModelSection:
    """A model as its files have it."""
    return ModelSection(name_or_path=path, quantization="none", trust_remote_code=trust_remote_code)
