"""Malformed recipes, data, models and adapters, and what each must be told."""
