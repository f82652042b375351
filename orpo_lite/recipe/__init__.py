"""Recipe: the one YAML that describes a complete run. Schema, loading, saving; nothing here imports torch."""

from orpo_lite.recipe.recipe import Recipe
from orpo_lite.recipe.schema import AdapterSection, DataSection, DataSource, ModelSection, RuleSection, Section

__all__ = [
    "AdapterSection", "DataSection", "DataSource", "ModelSection", "Recipe", "RuleSection", "Section",
]  # fmt: skip
