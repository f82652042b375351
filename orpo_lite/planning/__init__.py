"""Predicted memory of a run, from its recipe and its model's configuration alone: no weights, no GPU, no network."""
