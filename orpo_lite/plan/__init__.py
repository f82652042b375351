"""Predict the memory and time of a run without weights or GPU."""
