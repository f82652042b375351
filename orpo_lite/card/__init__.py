"""README.md of a run folder, or of what was made from it: a model card made from run.json, never by hand."""

from orpo_lite.card.licence import find_licence
from orpo_lite.card.shareable import hub_id, shareable
from orpo_lite.card.text import model_card, write_card

__all__ = ["find_licence", "hub_id", "model_card", "shareable", "write_card"]
