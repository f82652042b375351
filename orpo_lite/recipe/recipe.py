"""Class Recipe: load, override, validate and save the description of a run."""

from __future__ import annotations

import typing
from pathlib import Path
from typing import Any

import yaml
from pydantic import Field, ValidationError, field_validator, model_validator
from rich.markup import escape

from orpo_lite.common.console import errors, rank
from orpo_lite.common.credentials import without_secrets
from orpo_lite.common.files import write_atomically
from orpo_lite.recipe.loading import RecipeError, apply_override, find_recipe, read_yaml
from orpo_lite.recipe.own_data import account, drop_about_data, sources_of
from orpo_lite.recipe.schema import (
    AdapterSection,
    DataSection,
    EvaluationSection,
    MemorySection,
    ModelSection,
    OrpoSection,
    Section,
)
from orpo_lite.recipe.training_fields import check_training_field
from orpo_lite.recipe.validation import describe, leaves, of_a_word, unfit


class Recipe(Section):
    """One complete run."""

    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run, in its report and model card, and of its folder: outputs/<name>, or outputs/<name>-2 and so on where that
    holds another run. training.output_dir puts the folder elsewhere."""
    description: str = ""
    """The purpose of the run, in a sentence."""
    needs: str = ""
    """Its requirements: card, memory, disk."""
    model: ModelSection
    """The base model, its quantization and precision."""
    adapter: AdapterSection | None = AdapterSection()
    """null: full fine-tuning (needs quantization: none)."""
    data: DataSection
    """The pairs, and how they become tokens."""
    orpo: OrpoSection = OrpoSection()
    """The loss and its batches."""
    training: dict[str, Any] = {}
    """Any field of transformers.TrainingArguments, by its own name, save_minutes, and early_stopping_patience."""
    memory: MemorySection = MemorySection()
    """Trades of speed for memory."""
    evaluation: EvaluationSection = EvaluationSection()
    """Sample answers before and after training."""

    @field_validator("training")
    @classmethod
    def _training_fields(cls, given: dict[str, Any]) -> dict[str, Any]:
        problems, clean = [], {}
        for key, value in given.items():
            if (key, value) == ("on_nonfinite", "stop"):  # recipes of older run folders may say so
                continue
            try:
                clean[key] = check_training_field(key, value)
            except ValueError as error:
                problems.append(str(error))
        if problems:
            raise ValueError("\n".join(problems))
        return clean

    @model_validator(mode="after")
    def _sections_agree(self) -> Recipe:
        problems = []
        model, data, memory = self.model, self.data, self.memory
        if memory.offload_activations and memory.checkpointing in ("none", 0):
            problems.append(
                f"memory.offload_activations is true, but memory.checkpointing is {memory.checkpointing}: only what checkpointed "
                "layers keep is offloaded; set memory.checkpointing to auto, all or a number of layers"
            )
        if model.quantization != "none" and self.adapter is None:
            problems.append(
                "adapter is null (full fine-tuning), which changes the base weights, but model.quantization is "
                f"{model.quantization}: set model.quantization=none, or give an adapter"
            )
        if data.max_prompt_length and data.max_length and data.max_prompt_length >= data.max_length:
            problems.append(
                f"data.max_prompt_length ({data.max_prompt_length}) leaves no room for an answer in data.max_length "
                f"({data.max_length}): make it smaller"
            )
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @property
    def folder(self) -> Path:
        """Return the run folder: training.output_dir, or `outputs/<name>`."""
        return Path(self.training.get("output_dir") or Path("outputs") / self.name)

    @property
    def plans_batches(self) -> bool:
        """Return True where micro-batches and checkpointed layers are to be planned for the card in use."""
        return self.training.get("per_device_train_batch_size") == "auto"

    @property
    def pairs_at_once(self) -> int:
        """Return the pairs of a micro-batch; 1 for `auto`, whose micro-batches hold orpo.tokens_per_batch once planned."""
        return 1 if self.plans_batches else self.training.get("per_device_train_batch_size", 8)

    @classmethod
    def load(cls, source: str | Path, overrides: typing.Sequence[str] = ()) -> Recipe:
        """Read a recipe and apply `key=value` overrides in dotted form.

        Args:
            source: name of a shipped recipe, path of a YAML file, or a run folder.
            overrides: for example ["training.learning_rate=5e-6", "data.train=my.jsonl"]; values are YAML. With other
                training data, what the recipe says about its own is dropped, which a line on stderr says.

        Raises:
            RecipeError: no such recipe, YAML that does not parse, or fields that do not fit; all at once.
        """
        path = find_recipe(source)
        content = read_yaml(path)
        content.setdefault("name", path.stem)
        own = sources_of(content)
        overridden = [apply_override(content, word) for word in overrides]
        dropped = drop_about_data(content, own, overridden)
        recipe = cls.parse(content, str(path), overrides)
        if dropped and rank() == 0:
            errors.print(escape(without_secrets(account(dropped, recipe.name))), soft_wrap=True)
        return recipe

    @classmethod
    def parse(cls, content: dict[str, Any], source: str = "recipe", words: typing.Sequence[str] = ()) -> Recipe:
        """Validate a plain dict; `source` names it in the error, except for what the `words` key=value have set.

        Raises:
            RecipeError: fields that do not fit, all at once.
        """
        problems = [f"{place}: {wrong}" for place, value in leaves(content) if (wrong := unfit(value))]
        if not problems:
            try:
                return cls.model_validate(content)
            except ValidationError as error:
                problems = describe(error, cls)
        own = {line: told for line in problems if (told := of_a_word(line, words))}
        if len(own) == len(problems):
            raise RecipeError("command line", list(own.values()))
        others = [line for line in problems if line not in own]
        raise RecipeError(source, [*others, *(f"command line, {told}" for told in own.values())])

    def save(self, path: Path) -> None:
        """Write every field, defaults included, so that the file loads back as the same run."""
        write_atomically(path, yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False, allow_unicode=True))
